"""mmevm's classifiers in mmpretrain's hub of models, so that ``mmpretrain.list_models`` and ``get_model`` know them.

mmpretrain takes seconds to import and may not be there, so nothing here imports it: the models are registered when
somebody else does.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

HUB = 'mmpretrain.apis.model'


def find_index() -> Path:
    """Where ``model-index.yml`` is, beside the ``configs`` that it names.

    Returns:
        The package's own, ``mmevm/.mim/model-index.yml``, or that of the repository from which mmevm is imported.
    """
    package = Path(__file__).resolve().parent
    folder = package / '.mim' if (package / '.mim').is_dir() else package.parent
    return folder / 'model-index.yml'


def register() -> None:
    """List mmevm's classifiers in mmpretrain, at once or as soon as it is imported.

    It does not import mmpretrain, and may be called any number of times.
    """
    if HubFinder not in sys.meta_path:
        sys.meta_path.insert(0, HubFinder)
    if hasattr(sys.modules.get(HUB), 'ModelHub'):
        _fill(sys.modules[HUB])


class HubFinder:
    """Has the finders after it find mmpretrain's hub, and fills it once it is loaded, also when it is reloaded."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Python asks every finder with these arguments."""
        if fullname != HUB:
            return None
        for finder in sys.meta_path[sys.meta_path.index(cls) + 1 :]:
            find_spec = getattr(finder, 'find_spec', None)  # Python 3.11 still takes finders without it
            spec = find_spec and find_spec(fullname, path, target)
            if spec:
                spec.loader = _FillingLoader(spec.loader)
                return spec
        return None


class _FillingLoader(Loader):
    """Steps in for a module's loader until the module is executed."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # such as get_source

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _fill(module)


def _fill(module: ModuleType) -> None:
    hub = module.ModelHub
    if getattr(hub, 'knows_mmevm', False):  # it refuses names that it has
        return
    path = find_index()
    if not path.is_file():
        warnings.warn(
            f"{path} is missing, so mmpretrain lists none of mmevm's classifiers: install mmevm again.", stacklevel=2
        )
        return
    hub.knows_mmevm = True
    try:
        hub.register_model_index(path, config_prefix=path.parent)
    except ValueError as error:  # of a name that another plugin has taken; it shall not keep mmpretrain from loading
        warnings.warn(f"mmpretrain does not list all of mmevm's classifiers: {error}", stacklevel=2)
