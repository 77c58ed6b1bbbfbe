"""Optimizers for training on a CPU."""

from typing import Any

import torch
from mmengine.config import Config
from torch.torch_version import TorchVersion

_FUSED = ('Adam', 'AdamW', 'SGD')


def use_fused_optimizer(cfg: Config) -> None:
    """Set ``fused=True`` for PyTorch's optimizers that have it, if the training runs on a CPU.

    MMEngine makes a group of each parameter, so that an optimizer calls a dozen operators for each; a fused one calls
    one. PyTorch has them for CPUs since 2.4. A config that sets ``fused`` or ``foreach`` is not changed.

    Args:
        cfg: A config for mmengine's runner, which is changed in place.
    """
    optimizer: dict[str, Any] = cfg.get('optim_wrapper', {}).get('optimizer') or {}
    name = getattr(optimizer.get('type'), '__name__', optimizer.get('type'))
    has_fused = name in _FUSED and TorchVersion(torch.__version__) >= '2.4'
    if has_fused and not torch.cuda.is_available() and not optimizer.keys() & {'fused', 'foreach', 'differentiable'}:
        optimizer['fused'] = True
