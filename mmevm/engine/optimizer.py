"""Optimizers for training on a CPU."""

from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from torch.torch_version import TorchVersion

_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)


def use_fused_optimizer(cfg: Config) -> None:
    """Set ``fused=True`` for PyTorch's optimizers that have it, if the training runs on a CPU.

    Otherwise they call about a dozen operators for each parameter. PyTorch has fused ones for CPUs since 2.4. A config
    that sets ``fused``, ``foreach`` or ``differentiable`` is not changed, and a resumed training keeps the setting of
    its checkpoint.

    Args:
        cfg: A config for mmengine's runner, which is changed in place.
    """
    optimizer: dict[str, Any] = (cfg.get('optim_wrapper') or {}).get('optimizer') or {}
    kind = optimizer.get('type')
    is_known = kind in [cls.__name__ for cls in _FUSED] if isinstance(kind, str) else kind in _FUSED
    if not is_known or get_device() != 'cpu' or TorchVersion(torch.__version__) < '2.4':
        return
    if not optimizer.keys() & {'fused', 'foreach', 'differentiable'}:
        optimizer['fused'] = True
