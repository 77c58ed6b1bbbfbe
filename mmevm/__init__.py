"""EfficientViM as a backbone for the OpenMMLab libraries.

Nothing needs to be imported from here by hand: configs name ``mmevm.EfficientViM``, and mmengine imports the package.
"""

from .families import check_families
from .mmcv_ops import register
from .version import __version__

check_families()
register()

__all__ = ['__version__']
