"""Print versions, OpenMMLab distribution, operators and device for a bug report: ``python -m mmevm.env``."""

import platform
import sys
from pathlib import Path

import torch

from . import __file__ as init_file
from . import __version__
from .distributions import DISTRIBUTIONS, installed_version
from .mmcv_ops.install import status

_PACKAGES = ('torch', 'torchvision', 'timm', 'numpy', 'opencv-python', 'pycocotools', 'onnxruntime', 'openvino')


def describe_env() -> dict[str, str]:
    """Return names and values in the order in which they are printed."""
    env = {
        'mmevm': f'{__version__} ({Path(init_file).parent})',
        'Python': f'{platform.python_version()} ({sys.executable})',
        'platform': platform.platform(),
    }
    for distribution, packages in DISTRIBUTIONS.items():
        versions = {name: installed_version(name) for name in packages}
        found = [f'{name} {version}' for name, version in versions.items() if version]
        env[f'OpenMMLab packages ({distribution})'] = ', '.join(found) or 'none'
    env.update({name: installed_version(name) or 'not installed' for name in _PACKAGES})
    env['mmcv operators'] = status()
    env['device'] = (
        ', '.join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        or f'CPU ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)'
    )
    return env


if __name__ == '__main__':
    sys.stdout.write(''.join(f'{name}: {value}\n' for name, value in describe_env().items()))
