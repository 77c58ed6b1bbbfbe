"""EfficientViM as a backbone for the OpenMMLab libraries.

Nothing needs to be imported from here by hand: configs name ``mmevm.EfficientViM``, and mmengine imports the package.
``import mmevm`` also makes mmpretrain list the classifiers: ``mmpretrain.list_models('efficientvim*')``.
"""

import warnings

from . import config_path, mmcv_ops, model_hub
from .distributions import check_distributions
from .version import __version__

# mmengine and mmdet say these on every run. mmevm.checks warns of the first where a config uses that metric; the extra
# [openmmlab] takes care of the second.
warnings.filterwarnings('ignore', 'faster_coco_eval is not installed', UserWarning)
warnings.filterwarnings('ignore', 'pkg_resources is deprecated', UserWarning)

check_distributions()
mmcv_ops.register()
config_path.register()
model_hub.register()

__all__ = ['__version__']
