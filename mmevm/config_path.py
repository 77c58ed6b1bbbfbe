"""Resolve config names such as ``mmevm::maskrcnn_evm_m4.py``, from any folder.

``_base_ = 'mmevm::NAME'`` works in every config that mmengine reads, as ``_base_ = 'mmdet::NAME'`` does, and
``mmevm::NAME`` is a config for mmevm's own tools. NAME is a path below ``configs/``. mmengine itself resolves only the
packages of its own list. ``mmseg::NAME``, which is in that list, is made to work with onedl-mmsegmentation too.
"""

import sys
from pathlib import Path
from types import ModuleType

from .distributions import installed_version
from .errors import ConfigError
from .import_hooks import after_import

PREFIX = 'mmevm::'


def find_root() -> Path:
    """Return the folder of ``configs/``, ``tools/`` and ``model-index.yml``.

    Returns:
        ``mmevm/.mim`` of an installed wheel, otherwise the repository.
    """
    package = Path(__file__).resolve().parent
    return package / '.mim' if (package / '.mim').is_dir() else package.parent


def find_config(name: str) -> Path:
    """Return the path of a config of mmevm.

    Args:
        name: Its name, such as 'mmevm::maskrcnn_evm_m4.py'.

    Raises:
        ConfigError: If there is no such config.
    """
    folder = find_root() / 'configs'
    path = folder / name.removeprefix(PREFIX)
    if not path.is_file():
        raise ConfigError(f'{name} does not exist. Use the name of a config in {folder}.')
    return path


def register() -> None:
    """Make mmengine resolve ``mmevm::`` in ``_base_``, now or as soon as it is imported."""
    after_import('mmengine.config.config', _extend)


def _extend(module: ModuleType) -> None:
    config = getattr(module, 'Config', None)  # missing while the module is being imported
    if config is None or config._get_cfg_path.__module__ == __name__:
        return
    if installed_version('onedl-mmsegmentation'):
        # onedl-mmengine knows only the name of OpenMMLab's own package, and cannot resolve mmseg::
        sys.modules['mmengine.config.utils'].MODULE2PACKAGE['mmseg'] = 'onedl-mmsegmentation'
    original = config._get_cfg_path

    def get_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
        # None, as of a relative path: types without a scope belong to the config's default_scope, not to mmevm
        return (str(find_config(cfg_path)), None) if cfg_path.startswith(PREFIX) else original(cfg_path, filename)

    config._get_cfg_path = staticmethod(get_cfg_path)
