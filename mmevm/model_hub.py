"""List the classifiers in MMPretrain: ``mmpretrain.list_models('efficientvim*')`` and ``mmpretrain.get_model``."""

import warnings
from types import ModuleType

from .config_path import find_root
from .import_hooks import after_import


def register() -> None:
    """Add the classifiers to MMPretrain's model hub, now or as soon as it is imported."""
    after_import('mmpretrain.apis.model', _fill)


def _fill(module: ModuleType) -> None:
    hub = getattr(module, 'ModelHub', None)  # missing while the module is being imported
    if hub is None or getattr(hub, 'has_mmevm', False):
        return
    index = find_root() / 'model-index.yml'
    if not index.is_file():
        warnings.warn(f'{index} does not exist: MMPretrain cannot list EfficientViM. Reinstall mmevm.', stacklevel=2)
        return
    hub.has_mmevm = True
    try:
        hub.register_model_index(index, config_prefix=index.parent)
    except ValueError as error:  # another plugin registered a model of the same name
        warnings.warn(f'MMPretrain cannot list all models of mmevm: {error}', stacklevel=2)
