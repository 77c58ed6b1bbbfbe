"""EfficientViM as a backbone for the OpenMMLab libraries.

Nothing needs to be imported from here by hand: configs name ``mmevm.EfficientViM``, and mmengine imports the package.
``import mmevm`` also makes mmpretrain list the classifiers: ``mmpretrain.list_models('efficientvim*')``.
"""

from . import mmcv_ops, model_index
from .families import check_families
from .version import __version__

check_families()
mmcv_ops.register()
model_index.register()

__all__ = ['__version__']
