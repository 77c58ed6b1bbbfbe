"""Convolutions whose weights lie in memory as a CPU's kernels read them."""

import platform
from typing import Any

import torch
from torch import Tensor, nn

from mmevm.compat import is_autocast_enabled, is_compiling


class PackedConv2d(nn.Conv2d):
    """``nn.Conv2d`` for inference, whose weight is brought into oneDNN's own layout once, not in each call.

    PyTorch does so itself where it compiles a model. Which layout that is depends on the shape of the images: the
    second batch of one shape in a row is the first that finds its weights so. All else is ``nn.Conv2d``: the numbers,
    bit for bit, the state dict, and what runs where PyTorch has another kernel than oneDNN's, for images that are not
    in channels_last, with autocast, while something traces or compiles the model, and where a gradient is asked for.
    """

    _packed: tuple[Tensor, int, torch.Size, Tensor] | None = None  # the weight, its version, the shape, the layout
    _last_shape: torch.Size | None = None

    def forward(self, x: Tensor) -> Tensor:
        """As ``nn.Conv2d``: (B, C, H, W) to (B, C', H', W')."""
        if is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:
            return super().forward(x)
        shape = x.shape
        if shape != self._last_shape:
            self.__dict__['_last_shape'] = shape  # past nn.Module's own checks, which take longer than all of this
            return super().forward(x)
        layout = self._layout(x) if self._can_be_packed(x) else None
        if layout is None:
            return super().forward(x)
        geometry = self.padding, self.stride, self.dilation, self.groups
        return _convolve(x, layout, self.bias, *geometry, 'none', [], '')

    def _layout(self, x: Tensor) -> Tensor | None:
        """The weight as oneDNN's kernel for this shape reads it; it would rearrange another one slowly, each time."""
        weight, shape = self.weight, x.shape
        if self._packed is not None:
            old, version, of, layout = self._packed
            if of == shape and old.data_ptr() == weight.data_ptr() and version == weight._version:
                return layout
        if self._backend(x) != 'Mkldnn':
            return None
        weight = weight.detach()
        layout = _reorder(weight, self.padding, self.stride, self.dilation, self.groups, shape)
        # The weight is kept, so that no other one can come to lie where it was.
        self._packed = weight, weight._version, shape, layout
        return layout

    def _backend(self, x: Tensor) -> str:
        """Whose kernel PyTorch takes. Another one rounds otherwise, and numbers would depend on what was before."""
        geometry = self.stride, self.padding, self.dilation, False, (0, 0), self.groups
        return torch._C._select_conv_backend(x, self.weight, self.bias, *geometry).name

    def _can_be_packed(self, x: Tensor) -> bool:
        weight = self.weight
        return bool(
            _HAS_KERNELS
            and x.is_cpu
            and weight.is_cpu
            and x.dtype == weight.dtype == torch.float32
            and x.dim() == 4
            and x.is_contiguous(memory_format=torch.channels_last)
            and not x.is_contiguous()  # as maps of one pixel are too, which kernels take for either
            and torch.backends.mkldnn.enabled
            and not is_autocast_enabled('cpu')
            and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
            and not weight.is_inference()  # which do not say when they change
        )

    def __getstate__(self) -> dict[str, Any]:
        """All but the layout, which belongs to this process."""
        return self.__dict__ | {'_packed': None, '_last_shape': None}


_HAS_KERNELS = (
    platform.machine() in ('x86_64', 'AMD64')
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, '_convolution_pointwise')
    and hasattr(torch.ops.mkldnn, '_reorder_convolution_weight')
    and hasattr(torch._C, '_select_conv_backend')
)
if _HAS_KERNELS:
    _convolve = torch.ops.mkldnn._convolution_pointwise.default  # looking it up takes microseconds
    _reorder = torch.ops.mkldnn._reorder_convolution_weight.default
