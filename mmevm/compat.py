"""Functions that older versions of PyTorch lack or name differently."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# torch.compile replaces either by True. torch 2.1 has only the latter.
is_compiling = torch.compiler.is_compiling if hasattr(torch.compiler, 'is_compiling') else torch._utils.is_compiling


def is_autocast_enabled(device_type: str) -> bool:
    """Return whether autocast is on for this type of device."""
    if hasattr(torch, 'get_autocast_dtype'):  # since torch 2.4 each device is asked by its name
        return torch.is_autocast_enabled(device_type)
    return torch.is_autocast_cpu_enabled() if device_type == 'cpu' else torch.is_autocast_enabled()


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Run ``nn.MultiheadAttention`` as separate operators, not as the fused one of inference.

    Gradients are disabled from torch 2.3 on and enabled before, where nothing else turns the fused operator off.
    """
    if not hasattr(torch.backends, 'mha'):  # before torch 2.3
        with torch.enable_grad():
            yield
        return
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
