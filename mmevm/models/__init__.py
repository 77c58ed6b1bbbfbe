"""The network of the paper: layers, mixers, backbone, neck and classifier. See docs/dev/architecture.md.

Classes are imported on first use: a backbone alone needs neither MMDetection nor MMPretrain.
"""

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ablations import NCSSD, MultiHeadHSMSSD, SelfAttention
    from .classifier import DistillationClassifier, FusionClsHead
    from .efficientvim import EfficientViM
    from .layers import LayerNorm2d
    from .mixers import HSMSSD
    from .upsample_fpn import UpsampleFPN

_MODULES = {
    'HSMSSD': 'mixers',
    'LayerNorm2d': 'layers',
    'EfficientViM': 'efficientvim',
    'UpsampleFPN': 'upsample_fpn',
    'FusionClsHead': 'classifier',
    'DistillationClassifier': 'classifier',
    'NCSSD': 'ablations',
    'MultiHeadHSMSSD': 'ablations',
    'SelfAttention': 'ablations',
}

__all__ = [
    'HSMSSD',
    'NCSSD',
    'DistillationClassifier',
    'EfficientViM',
    'FusionClsHead',
    'LayerNorm2d',
    'MultiHeadHSMSSD',
    'SelfAttention',
    'UpsampleFPN',
]


# Modules that need a package that is not always installed.
_REQUIRES = {'upsample_fpn': 'mmdet', 'classifier': 'mmpretrain'}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'.{_MODULES[name]}', __name__), name)


def register(name: str | None = None) -> None:
    """Import the module that registers a class; of an unknown name, every module whose requirements are installed."""
    modules = (
        [_MODULES[name]]
        if name in _MODULES
        else [
            module
            for module in dict.fromkeys(_MODULES.values())
            if find_spec(_REQUIRES.get(module, 'torch')) is not None
        ]
    )
    for module in modules:
        importlib.import_module(f'.{module}', __name__)
