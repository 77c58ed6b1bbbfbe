"""Random weights for comparisons: initial ones (norms 1 and 0, equal gates) would hide most errors."""

import torch
from torch import nn


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Set norms, running statistics, gates, biases and other vectors to random values; keep those of convolutions."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point():
            continue
        if name.endswith(('running_var', 'norm.weight', 'norms.0.weight', 'norms.1.weight', 'norms.2.weight')):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith('alpha'):
            tensor.normal_(0, 1, generator=generator)
        elif tensor.ndim < 2:
            tensor.normal_(0, 0.2, generator=generator)
    return model
