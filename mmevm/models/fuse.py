"""Fold BatchNorm, gates and residual connections into convolutions.

Everything here is algebra on constants: it is computed in float64 and rounded once, to the dtype of the layer.
"""

from typing import TypeVar

import torch
from mmcv.cnn.bricks import Conv2d, Conv3d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .packed_conv import PackedConv2d

M = TypeVar('M', bound=nn.Module)


def check_type(module: nn.Module, kind: type[M]) -> M:
    """Return ``module`` if it computes what ``kind`` computes, so that the deploy mode of ``kind`` can replace it.

    Raises:
        TypeError: If ``module`` is not a ``kind``, or is a subclass with another forward.
    """
    if not isinstance(module, kind) or type(module).forward is not kind.forward:
        raise TypeError(
            f'{type(module).__name__} has no deploy mode: expected {kind.__name__}, or a subclass with the same '
            'forward. Use the model without switch_to_deploy().'
        )
    return module


def is_plain(conv: nn.Module) -> bool:
    """Return whether a convolution uses its weight unchanged: no weight standardization, parametrization or hook."""
    return type(conv) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2d, Conv3d) and not _has_hooks(conv)


def can_fold(conv: nn.Module, norm: nn.Module | None) -> bool:
    """Return whether a convolution and the norm after it are equal to one convolution in eval mode."""
    return (
        is_plain(conv)
        and isinstance(norm, _BatchNorm)
        and type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        and norm.running_mean is not None
        and norm.running_var is not None
        and not _has_hooks(norm)
    )


def _has_hooks(module: nn.Module) -> bool:
    # Spectral norm, weight norm and pruning set the weight in a hook.
    return bool(module._forward_pre_hooks or module._forward_hooks or 'forward' in vars(module))


def fold_norm(conv: _ConvNd, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Fold a BatchNorm, or no norm, into the convolution before it.

    Args:
        conv: A convolution padded with zeros and not dilated, the only kind that :func:`make_conv` builds.
        norm: BatchNorm with running statistics; or ``nn.Identity`` after a convolution without bias.

    Returns:
        Weight and bias of the equivalent convolution, in float64.

    Raises:
        ValueError: If they are not equal to such a convolution.
    """
    is_usual = is_plain(conv) and conv.padding_mode == 'zeros' and set(conv.dilation) == {1}
    if is_usual and conv.bias is None and isinstance(norm, nn.Identity):
        weight = conv.weight.detach().double()
        return weight, weight.new_zeros(len(weight))
    if not is_usual or not can_fold(conv, norm):
        raise ValueError(
            f'{type(conv).__name__} and {type(norm).__name__} cannot be folded into one convolution: expected a plain '
            'convolution, padded with zeros and not dilated, and a BatchNorm with running statistics (norm_cfg), both '
            'without hooks. Use the model without switch_to_deploy().'
        )
    return fold_batch_norm(conv, norm)


def fold_batch_norm(conv: _ConvNd, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return weight and bias, in float64, of the convolution equal to both in eval mode; requires :func:`can_fold`."""
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    bias = -norm.running_mean.double()
    if conv.bias is not None:
        bias = bias + conv.bias.detach().double()
    bias = bias * scale
    if norm.weight is not None:
        scale, bias = scale * norm.weight.detach().double(), bias * norm.weight.detach().double()
    if norm.bias is not None:
        bias = bias + norm.bias.detach().double()
    return scale_outputs(conv.weight.detach().double(), scale), bias


def fuse_gated_residual(weight: Tensor, bias: Tensor, gate: Tensor, shortcut: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the depthwise convolution ``shortcut·x + gate·conv(x)``.

    Args:
        weight: Weight of the depthwise convolution, (C, 1, k, k).
        bias: Its bias, (C,).
        gate: Factor of the convolution, (C,) or a scalar.
        shortcut: Factor of the input, (C,) or a scalar.
    """
    weight = scale_outputs(weight, gate.expand(len(weight)))
    center = weight.shape[-1] // 2
    weight[:, 0, center, center] += shortcut.to(weight)
    return weight, bias * gate.to(bias)


def scale_outputs(weight: Tensor, factor: Tensor) -> Tensor:
    """Multiply a weight (C, …) by a factor (C,) per output channel."""
    return weight * factor.to(weight).view(-1, *[1] * (weight.ndim - 1))


def make_constant(tensor: Tensor, like: Tensor) -> nn.Parameter:
    """Return a parameter without gradient, in the dtype of ``like``."""
    return nn.Parameter(tensor.detach().to(like.dtype), requires_grad=False)


def make_conv(weight: Tensor, bias: Tensor | None, like: _ConvNd) -> PackedConv2d:
    """Return a convolution with this weight and bias, and the geometry and dtype of ``like`` (square kernel)."""
    conv = PackedConv2d(
        like.in_channels,
        like.out_channels,
        like.kernel_size[0],
        like.stride[0],
        like.padding[0],
        groups=like.groups,
        bias=bias is not None,
        device='meta',  # initial values would be replaced
    )
    conv.weight = make_constant(weight.contiguous(memory_format=torch.channels_last), like.weight)
    if bias is not None:
        conv.bias = make_constant(bias, like.weight)
    return conv
