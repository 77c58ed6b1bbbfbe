"""Check that one distribution of the OpenMMLab packages is installed.

There are two with the same import names: OpenMMLab's own packages and the maintained forks, onedl-*.
"""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from .errors import ConfigError

DISTRIBUTIONS = {
    'onedl': ('onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmpretrain', 'onedl-mmsegmentation'),
    'openmmlab': ('mmengine', 'mmengine-lite', 'mmcv', 'mmcv-lite', 'mmdet', 'mmpretrain', 'mmsegmentation'),
}
_INSTALL = "in mmevm's folder, pip install -e '.[onedl]' or pip install -e '.[openmmlab]'"


def check_distributions() -> None:
    """Check that packages of exactly one distribution are installed.

    Raises:
        RuntimeError: If packages of both are installed, or mmengine or mmcv is missing. Not an ImportError: mmengine's
            registry ignores those and reports that mmevm.EfficientViM is not registered.
    """
    installed = {key: [name for name in names if installed_version(name)] for key, names in DISTRIBUTIONS.items()}
    if all(installed.values()):
        packages = ' '.join(name for names in installed.values() for name in names)
        raise RuntimeError(
            f'Both distributions of the OpenMMLab packages are installed, and they overwrite each other: {installed}. '
            f'Uninstall all of them (pip uninstall -y {packages}) and install one: {_INSTALL}.'
        )
    missing = [name for name in ('mmengine', 'mmcv') if find_spec(name) is None]
    if missing:
        raise RuntimeError(f'mmevm needs mmengine and mmcv; not installed: {", ".join(missing)}. Run {_INSTALL}.')


def check_segmentation() -> None:
    """Check that MMSegmentation is installed, which only segmentation needs.

    Raises:
        ConfigError: If it, or a package that it imports, is missing.
    """
    # mmsegmentation 1.2.2 does not declare ftfy and regex
    missing = [name for name in ('mmseg', 'ftfy', 'regex') if find_spec(name) is None]
    if missing:
        key = 'onedl' if any(map(installed_version, DISTRIBUTIONS['onedl'])) else 'openmmlab'
        packages = {'onedl': 'onedl-mmsegmentation', 'openmmlab': 'mmsegmentation ftfy regex'}[key]
        raise ConfigError(
            f"default_scope='mmseg' needs MMSegmentation; not installed: {', '.join(missing)}. Run pip install "
            f"{packages}, or in mmevm's folder, pip install -e '.[{key},seg-{key}]'."
        )


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
