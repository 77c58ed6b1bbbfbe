"""``python -m mmevm.env``: print what a bug report needs: versions, distribution, operators and device."""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import __file__ as init_file
from . import __version__
from .distributions import DISTRIBUTIONS
from .mmcv_ops.install import status

_PACKAGES = ('torch', 'torchvision', 'timm', 'numpy', 'opencv-python', 'pycocotools', 'onnxruntime', 'openvino')


def describe_env() -> dict[str, str]:
    """Return names and values, in the order in which they are printed.

    Returns:
        Versions of mmevm, Python and the packages that it builds on ('not installed' for those that are not), where
        mmevm is, which operators mmcv has, and the devices.
    """
    env = {
        'mmevm': f'{__version__} ({Path(init_file).parent})',
        'Python': f'{platform.python_version()} ({sys.executable})',
        'platform': platform.platform(),
    }
    for family, packages in DISTRIBUTIONS.items():
        found = [f'{name} {_version(name)}' for name in packages if _version(name) != 'not installed']
        env[f'OpenMMLab packages ({family})'] = ', '.join(found) or 'none'
    env.update({name: _version(name) for name in _PACKAGES})
    env['mmcv operators'] = status()
    env['device'] = (
        ', '.join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        or f'CPU ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)'
    )
    return env


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return 'not installed'


if __name__ == '__main__':
    sys.stdout.write(''.join(f'{name}: {value}\n' for name, value in describe_env().items()))
