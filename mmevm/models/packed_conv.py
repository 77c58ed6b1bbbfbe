"""Convolutions whose weights lie in memory as a CPU's kernels read them."""

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
    """A parameter that loses its ``_mark`` when somebody may write to its memory without increasing its ``_version``.

    The ways to do so start with one of the methods below.
    """

    @property
    def data(self) -> Tensor:
        """As of any tensor."""
        vars(self).pop('_mark', None)
        return super().data

    @data.setter
    def data(self, value: Tensor) -> None:
        vars(self).pop('_mark', None)
        nn.Parameter.data.__set__(self, value)  # type: ignore[attr-defined]

    def detach(self) -> Tensor:
        """As of any tensor."""
        vars(self).pop('_mark', None)
        return super().detach()

    def numpy(self, *, force: bool = False) -> 'np.ndarray':
        """As of any tensor."""
        vars(self).pop('_mark', None)
        return super().numpy(force=force)

    def untyped_storage(self) -> torch.UntypedStorage:
        """As of any tensor."""
        vars(self).pop('_mark', None)
        return super().untyped_storage()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        vars(self).pop('_mark', None)
        return super().__dlpack__(*args, **kwargs)


def _watch(weight: Tensor) -> tuple[object, int]:
    """Mark a parameter, and return the state that it keeps until somebody may have written to it."""
    weight.__class__ = WatchedParameter
    vars(weight).setdefault('_mark', object())
    return _state(weight)


def _state(weight: Tensor) -> tuple[object, int]:
    return vars(weight).get('_mark'), weight._version


class PackedConv2d(nn.Conv2d):
    """``nn.Conv2d`` for inference, whose weight is brought into oneDNN's own layout once, not in each call.

    PyTorch does so itself where it compiles a model. Which layout that is depends on the shape of the images: the
    second batch of one shape in a row is the first that finds its weights so. All else is ``nn.Conv2d``: the numbers,
    bit for bit, the state dict, and what runs before torch 2.8, where PyTorch has another kernel than oneDNN's, for
    images that are not in channels_last, with autocast, while something traces or compiles the model, and where a
    gradient is asked for.

    The weight may be written to at any time: in place, through ``weight.data`` as EMA does, a state dict, or an array.
    It is packed again after that, and is not packed while another tensor shares its memory, nor once NumPy has. Two
    ways of writing go unseen while it is packed: ``.data`` or ``.numpy()`` of a view, such as ``weight[0].data``, in
    place of ``weight.data[0]``; and C++ extensions that write to its address.
    """

    # The weight, its state, the shape of the images, the layout.
    _packed: tuple[Tensor, tuple[object, int], torch.Size, Tensor] | None = None
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
        """Whose kernel PyTorch takes. Another one rounds otherwise, and numbers would depend on what was before."""
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
            and not x.is_contiguous()  # as maps of one pixel are too, which kernels take for either
            and torch.backends.mkldnn.enabled
            and not is_autocast_enabled('cpu')
            and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
            and type(weight) in (nn.Parameter, WatchedParameter)
            and _has_version(weight)
        )

    def __getstate__(self) -> dict[str, Any]:
        """All but the layout, which belongs to this process."""
        return self.__dict__ | {'_packed': None, '_last_shape': None}


def _has_version(weight: Tensor) -> bool:
    try:
        return weight._version >= 0
    except RuntimeError:  # created in inference mode
        return False


def _is_shared(weight: Tensor) -> bool:
    """Whether something else may write to the memory of a tensor: another tensor, an array or a process."""
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
