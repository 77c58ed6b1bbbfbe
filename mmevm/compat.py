"""Functions that older versions of PyTorch lack or name differently."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# torch 2.1 has only the latter. torch.compile replaces both by True.
is_compiling = torch.compiler.is_compiling if hasattr(torch.compiler, 'is_compiling') else torch._utils.is_compiling


def is_autocast_enabled(device_type: str) -> bool:
    """Return whether autocast is on for this type of device."""
    if hasattr(torch, 'get_autocast_dtype'):  # since torch 2.4 is_autocast_enabled takes the type of the device
        return torch.is_autocast_enabled(device_type)
    return torch.is_autocast_cpu_enabled() if device_type == 'cpu' else torch.is_autocast_enabled()


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Run ``nn.MultiheadAttention`` as separate operators instead of the fused one of inference.

    Gradients are disabled, except before torch 2.3, where nothing but gradients turns the fused operator off.
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
