from importlib.util import find_spec

from .efficientvim import EfficientViM

__all__ = ['EfficientViM']

if find_spec('mmdet') is not None:  # classification alone needs no MMDetection
    from .upsample_fpn import UpsampleFPN

    __all__ += ['UpsampleFPN']
