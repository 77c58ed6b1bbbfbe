"""OpenMMLab's packages exist in two families with the same import names; exactly one of them must be installed."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

DISTRIBUTIONS = {
    'onedl': ('onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmpretrain'),
    'openmmlab': ('mmengine', 'mmengine-lite', 'mmcv', 'mmcv-lite', 'mmdet', 'mmpretrain'),
}


def check_distributions() -> None:
    """Make sure that the packages under mmevm are there once.

    Raises:
        RuntimeError: If packages of both families are installed, or not all that mmevm needs. It is no ImportError
            because mmengine's registry swallows these, and the reader of a config would only see that
            ``mmevm.EfficientViM`` is unknown.
    """
    installed = {family: [name for name in names if _is_installed(name)] for family, names in DISTRIBUTIONS.items()}
    if all(installed.values()):
        raise RuntimeError(
            f'Both families of OpenMMLab packages are installed, and they overwrite each other: {installed}. '
            'Uninstall all of them (pip uninstall -y …) and install one again: '
            "in mmevm's folder, pip install -e '.[onedl]' or pip install -e '.[openmmlab]'."
        )
    missing = [name for name in ('mmengine', 'mmcv') if find_spec(name) is None]
    if missing:
        raise RuntimeError(
            f'mmevm needs mmengine and mmcv; not installed: {", ".join(missing)}. On a PyTorch of today: '
            "in mmevm's folder, pip install -e '.[onedl]'; with OpenMMLab's own, pip install -e '.[openmmlab]'."
        )


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
