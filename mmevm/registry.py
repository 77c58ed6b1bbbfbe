"""The registry scope ``mmevm``.

For ``type='mmevm.X'`` in a config, MMEngine imports ``mmevm.registry`` and looks for ``X`` in the child registries of
this module. No ``custom_imports`` are needed.
"""

import importlib

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import WEIGHT_INITIALIZERS as MMENGINE_WEIGHT_INITIALIZERS
from mmengine.registry import Registry


class _ModelRegistry(Registry):
    """Import the module of a model on first use: the backbone needs neither MMDetection nor MMPretrain."""

    def get(self, key: str) -> type | None:
        """Return the class of this name, or None."""
        name = key.removeprefix(f'{self.scope}.') if isinstance(key, str) else None
        for location in self._locations:
            importlib.import_module(location).register(name)
        return super().get(key)


MODELS = _ModelRegistry('model', parent=MMENGINE_MODELS, scope='mmevm', locations=['mmevm.models'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mmevm', locations=['mmevm.engine.hooks'])
LOOPS = Registry('loop', parent=MMENGINE_LOOPS, scope='mmevm', locations=['mmevm.engine.loops'])
WEIGHT_INITIALIZERS = Registry(
    'weight initializer', parent=MMENGINE_WEIGHT_INITIALIZERS, scope='mmevm', locations=['mmevm.checkpoints.load']
)
