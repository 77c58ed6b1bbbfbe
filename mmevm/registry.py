"""The registry scope ``mmevm``.

Whenever an OpenMMLab config says ``type='mmevm.X'``, mmengine imports ``mmevm.registry`` by that name and looks for
``X`` in the children found here. That is all it takes: no ``custom_imports``.
"""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='mmevm', locations=['mmevm.models'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mmevm', locations=['mmevm.hooks'])
LOOPS = Registry('loop', parent=MMENGINE_LOOPS, scope='mmevm', locations=['mmevm.training'])
