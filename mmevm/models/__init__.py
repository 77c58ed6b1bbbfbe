from importlib.util import find_spec

from .ablation_mixers import NCSSD, MultiHeadHSMSSD, SelfAttention
from .efficientvim import EfficientViM
from .mixers import HSMSSD

__all__ = ['HSMSSD', 'NCSSD', 'EfficientViM', 'MultiHeadHSMSSD', 'SelfAttention']

if find_spec('mmdet') is not None:  # classification alone needs no MMDetection
    from .upsample_fpn import UpsampleFPN

    __all__ += ['UpsampleFPN']

if find_spec('mmpretrain') is not None:  # detection alone needs no MMPretrain
    from .fusion_head import FusionClsHead
    from .taught_classifier import TaughtImageClassifier

    __all__ += ['FusionClsHead', 'TaughtImageClassifier']
