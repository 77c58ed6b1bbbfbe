"""Extend mmengine and mmpretrain when they are imported. Importing mmevm imports neither, so it takes milliseconds.

mmevm changes how Python imports in four places, because the libraries have no extension point for them:

- ``mmevm.pth`` in site-packages imports mmevm when a program first imports mmengine. Other tools, such as MMDetection's
  tools/train.py, read a config before anything in it can import mmevm. See ``mmevm_startup.py``.
- ``mmengine.config``: ``_base_ = 'mmevm::maskrcnn_evm_m4.py'`` is resolved. See ``config_path.py``.
- ``mmpretrain.apis.model``: ``mmpretrain.list_models`` and ``get_model`` find the classifiers. See ``model_hub.py``.
- ``mmcv._ext``: fallback operators where mmcv has no compiled ones. See ``mmcv_ops/finder.py``.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_callbacks: dict[str, Callable[[ModuleType], None]] = {}


def after_import(name: str, callback: Callable[[ModuleType], None]) -> None:
    """Call a function whenever a module has been imported or reloaded, and now if it is imported already.

    Args:
        name: Full name of the module.
        callback: Receives the module. It must tolerate repeated calls for the same module.
    """
    _callbacks[name] = callback
    if _CallbackFinder not in sys.meta_path:
        sys.meta_path.insert(0, _CallbackFinder)
    if name in sys.modules:
        callback(sys.modules[name])


class _CallbackFinder:
    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _callbacks:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        exec_module = spec.loader.exec_module

        def exec_and_call(module: ModuleType) -> None:
            exec_module(module)
            _callbacks[fullname](module)

        spec.loader.exec_module = exec_and_call  # type: ignore[method-assign]
        return spec
