"""EfficientViM as a backbone for MMDetection, MMPretrain and MMSegmentation.

Configs need no import of this package: they name ``mmevm.EfficientViM``, and mmengine imports ``mmevm.registry``. In
Python, the names below are imported on first use. ``import mmevm`` imports neither PyTorch nor the OpenMMLab packages;
it extends these when they are imported: see ``import_hooks.py``.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from . import checkpoint_schemes, config_path, mmcv_ops, model_hub
from .distributions import check_distributions
from .version import __version__

if TYPE_CHECKING:
    from .checkpoints import convert_checkpoint
    from .deployment import deploy
    from .models import HSMSSD, DistillationClassifier, EfficientViM, FusionClsHead, UpsampleFPN

__all__ = [
    'HSMSSD',
    'DistillationClassifier',
    'EfficientViM',
    'FusionClsHead',
    'UpsampleFPN',
    '__version__',
    'convert_checkpoint',
    'deploy',
]

_PACKAGES = {
    'HSMSSD': 'models',
    'DistillationClassifier': 'models',
    'EfficientViM': 'models',
    'FusionClsHead': 'models',
    'UpsampleFPN': 'models',
    'convert_checkpoint': 'checkpoints',
    'deploy': 'deployment',
}

# mmengine and mmdet print these on every run. mmevm.checks warns of the first if a config uses that metric; the extra
# [openmmlab] avoids the second.
warnings.filterwarnings('ignore', 'faster_coco_eval is not installed', UserWarning)
warnings.filterwarnings('ignore', 'pkg_resources is deprecated', UserWarning)

check_distributions()
mmcv_ops.register()
config_path.register()
checkpoint_schemes.register()
model_hub.register()


def __getattr__(name: str) -> Any:
    if name not in _PACKAGES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(importlib.import_module(f'.{_PACKAGES[name]}', __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
