"""Fallback operators: run OpenMMLab models when mmcv has no compiled operators (``mmcv._ext``).

:func:`register` makes the import of ``mmcv._ext`` fall back to operators built from torch and torchvision.
``python -m mmevm.mmcv_ops install`` does the same for programs that import ``mmcv.ops`` before they import mmevm.
docs/mmcv_ops.md lists the supported operators.

This package imports nothing else of mmevm.
"""

from .finder import register

__all__ = ['register']
