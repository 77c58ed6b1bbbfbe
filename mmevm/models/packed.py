"""Convolutions whose weights lie in memory as a CPU's kernels read them."""

import platform
from typing import Any

import torch
from torch import Tensor, nn


class PackedConv2d(nn.Conv2d):
    """``nn.Conv2d`` for inference, whose weight is brought into oneDNN's own layout once, not in each call.

    PyTorch does so itself where it compiles a model. The state dict is that of ``nn.Conv2d``, and so is what runs where
    oneDNN does not: on other devices and processors, with other dtypes and autocast, while something traces or compiles
    the model, and where a gradient is asked for.
    """

    _packed: tuple[Tensor, int, Tensor] | None = None  # the weight, its version, the layout

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Conv2d``: (B, C, H, W) to (B, C', H', W')."""
        if not self._can_be_packed(x):
            return super().forward(x)
        weight = self.weight.detach()
        geometry = self.padding, self.stride, self.dilation, self.groups
        old, version, layout = self._packed or (None, None, None)
        if old is None or old.data_ptr() != weight.data_ptr() or version != weight._version:
            layout = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, x.shape)
            # The weight is kept, so that no other one can come to lie where it was.
            self._packed = weight, weight._version, layout
        return torch.ops.mkldnn._convolution_pointwise(x, layout, self.bias, *geometry, 'none', [], '')

    def _can_be_packed(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:
            return False
        return bool(
            _HAS_KERNELS
            and x.device.type == self.weight.device.type == 'cpu'
            and x.dtype == self.weight.dtype == torch.float32
            and x.dim() == 4
            and torch.backends.mkldnn.enabled
            and not _autocasts()
            and not (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad))
            and not self.weight.is_inference()  # which do not say when they change
        )

    def __getstate__(self) -> dict[str, Any]:
        """All but the layout, which belongs to this process."""
        return self.__dict__ | {'_packed': None}


def _autocasts() -> bool:
    try:
        return torch.is_autocast_enabled('cpu')
    except TypeError:  # of torch < 2.4, which has a function for each device
        return torch.is_autocast_cpu_enabled()


_HAS_KERNELS = (
    platform.machine() in ('x86_64', 'AMD64')
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, '_convolution_pointwise')
    and hasattr(torch.ops.mkldnn, '_reorder_convolution_weight')
)
