"""The network of the paper: layers, mixers, backbone, neck and classifier.

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

_MODULES = {
    'HSMSSD': 'mixers',
    'NCSSD': 'ablations',
    'DistillationClassifier': 'classifier',
    'EfficientViM': 'efficientvim',
    'FusionClsHead': 'classifier',
    'LayerNorm2d': 'layers',
    'MultiHeadHSMSSD': 'ablations',
    'SelfAttention': 'ablations',
    'UpsampleFPN': 'upsample_fpn',
}
_REQUIREMENTS = {'upsample_fpn': 'mmdet', 'classifier': 'mmpretrain'}  # not always installed


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'.{_MODULES[name]}', __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def register(name: str | None = None) -> None:
    """Import the module that registers a class.

    Args:
        name: Name of the class. If it is unknown, import every module whose requirements are installed.
    """
    modules = {_MODULES[name]} if name in _MODULES else set(_MODULES.values())
    for module in sorted(modules):
        if name in _MODULES or module not in _REQUIREMENTS or find_spec(_REQUIREMENTS[module]) is not None:
            importlib.import_module(f'.{module}', __name__)
