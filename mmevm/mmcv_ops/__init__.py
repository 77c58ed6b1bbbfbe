"""OpenMMLab models on an mmcv that came without its compiled operators (``mmcv._ext``).

:func:`register` makes Python find a stand-in of that name, built from the operators of torch and torchvision, whenever
mmcv has no compiled module of its own. ``python -m mmevm.mmcv_ops install`` does the same for programs that import
``mmcv.ops`` before they import mmevm. docs/mmcv_ops.md lists what it covers.
"""

from .finder import register

__all__ = ['register']
