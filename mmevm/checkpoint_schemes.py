"""Register the checkpoint schemes ``timm://``, ``safe://`` and ``resume://`` in mmengine.

They are available in every ``load_from`` and ``init_cfg`` once mmevm is imported. The loaders themselves are imported
on first use.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .import_hooks import after_import

_LOADERS = {
    'timm://': 'mmevm.checkpoints.fetch:load_from_timm',
    'safe://': 'mmevm.checkpoints.fetch:load_safe',
    'resume://': 'mmevm.engine.training_state:load_from_training',
}
SCHEMES = tuple(_LOADERS)


def register() -> None:
    """Register the schemes, now or as soon as mmengine's checkpoint loader is imported."""
    after_import('mmengine.runner.checkpoint', _register)


def _register(module: ModuleType) -> None:
    checkpoint_loader = getattr(module, 'CheckpointLoader', None)  # missing while the module is being imported
    if checkpoint_loader is not None:
        for prefix, path in _LOADERS.items():
            checkpoint_loader.register_scheme(prefixes=prefix, loader=_lazy_loader(path), force=True)


def _lazy_loader(path: str) -> Callable[..., Any]:
    module, _, function = path.partition(':')

    def load(filename: str, map_location: str | None = None) -> Any:
        return getattr(importlib.import_module(module), function)(filename, map_location)

    load.__name__ = function  # mmengine logs it
    return load
