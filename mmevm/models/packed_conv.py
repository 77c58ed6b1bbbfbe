"""Convolutions that keep their weight in the memory layout of the CPU's kernels."""

import platform
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.torch_version import TorchVersion

from mmevm.compat import is_autocast_enabled, is_compiling

if TYPE_CHECKING:
    import numpy as np


class WatchedParameter(nn.Parameter):
    """A parameter that drops its ``_mark`` before its memory may be written to without increasing its ``_version``.

    Such a write needs one of the attributes below first.
    """

    @property
    def data(self) -> Tensor:
        """Like ``Tensor.data``."""
        vars(self).pop('_mark', None)
        return super().data

    @data.setter
    def data(self, value: Tensor) -> None:
        vars(self).pop('_mark', None)
        nn.Parameter.data.__set__(self, value)  # type: ignore[attr-defined]

    def detach(self) -> Tensor:
        """Like ``Tensor.detach``."""
        vars(self).pop('_mark', None)
        return super().detach()

    def numpy(self, *, force: bool = False) -> 'np.ndarray':
        """Like ``Tensor.numpy``."""
        vars(self).pop('_mark', None)
        return super().numpy(force=force)

    def untyped_storage(self) -> torch.UntypedStorage:
        """Like ``Tensor.untyped_storage``."""
        vars(self).pop('_mark', None)
        return super().untyped_storage()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        vars(self).pop('_mark', None)
        return super().__dlpack__(*args, **kwargs)


def _watch(weight: Tensor) -> tuple[object, int]:
    """Mark a parameter, and return its state, which changes when it may have been written to."""
    weight.__class__ = WatchedParameter
    vars(weight).setdefault('_mark', object())
    return _state(weight)


def _state(weight: Tensor) -> tuple[object, int]:
    return vars(weight).get('_mark'), weight._version


class PackedConv2d(nn.Conv2d):
    """``nn.Conv2d`` for inference that reorders its weight into oneDNN's layout once instead of in each call.

    torch.compile does the same. The layout depends on the shape of the input, so the weight is packed at the second
    input in a row with the same shape. The outputs are those of ``nn.Conv2d``, bit for bit, and so is the state dict.
    It falls back to ``nn.Conv2d`` before torch 2.8, where PyTorch selects another kernel than oneDNN's, for inputs that
    are not in channels_last, under autocast, while the model is traced or compiled, and where gradients are required.

    The weight may be changed at any time: in place, through ``weight.data`` (as EMA does), a state dict or an array. It
    is then packed again; it is not packed while another tensor shares its memory. Two kinds of writes are not detected
    while the weight is packed: through ``.data`` or ``.numpy()`` of a view, as in ``weight[0].data`` (use
    ``weight.data[0]``), and by C++ extensions that write to its address.
    """

    # The weight, its state, the shape of the input, the packed weight.
    _packed: tuple[Tensor, tuple[object, int], torch.Size, Tensor] | None = None
    _last_shape: torch.Size | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W'), like ``nn.Conv2d``."""
        if is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:
            return super().forward(x)
        shape = x.shape
        if shape != self._last_shape:
            self.__dict__['_last_shape'] = shape  # nn.Module.__setattr__ would take longer than everything else here
            return super().forward(x)
        layout = self._layout(x) if self._can_be_packed(x) else None
        if layout is None:
            return super().forward(x)
        geometry = self.padding, self.stride, self.dilation, self.groups
        return _convolve(x, layout, self.bias, *geometry, 'none', [], '')

    def _layout(self, x: Tensor) -> Tensor | None:
        """Return the weight in oneDNN's layout for this input; None if oneDNN does not run or memory is shared."""
        weight, shape = self.weight, x.shape
        packed = self._packed  # another thread may set it to None
        if packed is not None:
            of_weight, state, of_shape, layout = packed
            if of_weight is weight and of_shape == shape and _state(weight) == state:
                return layout
        if self._backend(x) != 'Mkldnn':
            return None
        if _is_shared(weight):
            self._packed = None
            return None
        layout = _reorder(weight.detach(), self.padding, self.stride, self.dilation, self.groups, shape)
        self._packed = weight, _watch(weight), shape, layout
        return layout

    def _backend(self, x: Tensor) -> str:
        """Return the backend that PyTorch selects. Another one would round differently than ``nn.Conv2d``."""
        geometry = self.stride, self.padding, self.dilation, False, (0, 0), self.groups
        return torch._C._select_conv_backend(x, self.weight, self.bias, *geometry).name

    def _can_be_packed(self, x: Tensor) -> bool:
        weight = self.weight
        return bool(
            _HAS_KERNELS
            and forward_ad._current_level < 0
            and torch._C._functorch.peek_interpreter_stack() is None  # vmap and the like
            and x.is_cpu
            and weight.is_cpu
            and x.dtype == weight.dtype == torch.float32
            and x.dim() == 4
            and x.is_contiguous(memory_format=torch.channels_last)
            and not x.is_contiguous()  # maps of one pixel are both, and kernels may take them for either
            and torch.backends.mkldnn.enabled
            and not is_autocast_enabled('cpu')
            and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
            and type(weight) in (nn.Parameter, WatchedParameter)
            and _has_version(weight)
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the packed weight, which belongs to this process."""
        return self.__dict__ | {'_packed': None, '_last_shape': None}


def _has_version(weight: Tensor) -> bool:
    try:
        return weight._version >= 0
    except RuntimeError:  # created in inference mode
        return False


def _is_shared(weight: Tensor) -> bool:
    """Return whether another tensor, an array or a process may write to the memory of a tensor."""
    return _uses(weight) > _USES_ALONE or weight.is_shared() or not weight.untyped_storage().resizable()


def _uses(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


_HAS_KERNELS = (
    platform.machine() in ('x86_64', 'AMD64')
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, '_convolution_pointwise')
    and hasattr(torch.ops.mkldnn, '_reorder_convolution_weight')
    and hasattr(torch._C, '_select_conv_backend')
    and hasattr(torch._C, '_storage_Use_Count')
    and hasattr(torch._C._functorch, 'peek_interpreter_stack')
    and hasattr(forward_ad, '_current_level')
    and TorchVersion(torch.__version__) >= '2.8'  # older torch.compile and torch.export refuse subclasses of Parameter
)
if _HAS_KERNELS:
    _USES_ALONE = _uses(torch.empty(1, device='cpu'))
    _convolve = torch.ops.mkldnn._convolution_pointwise.default  # looking it up takes microseconds
    _reorder = torch.ops.mkldnn._reorder_convolution_weight.default
