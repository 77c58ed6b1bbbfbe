"""Deformable convolutions, without modulation (DCN) and with it (DCNv2)."""

import torch
import torchvision
from torch import Tensor

from .precision import widen


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Convolution of bilinear samples, written to ``output``, (B, C_out, H, W).

    ``offset`` is y and x for each tap of the kernel, in pixels: (B, 2 · deformable_group · kH · kW, H, W).
    """
    input, weight, offset = widen(input), widen(weight), _readable(offset)
    output.copy_(
        torchvision.ops.deform_conv2d(input, offset, weight, None, (dH, dW), (padH, padW), (dilationH, dilationW))
    )


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Gradients with respect to the feature map and the offsets, written to ``grad_input`` and ``grad_offset``."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    grads = _backward(grad_output, input, weight, offset, None, geometry)
    grad_input.copy_(grads[0])
    grad_offset.copy_(grads[2])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add ``scale`` times the gradient with respect to the weight to ``grad_weight``."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    # It does not depend on the weight's values.
    _, grad, _, _, _ = _backward(grad_output, input, grad_weight, offset, None, geometry)
    grad_weight.add_(grad, alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Convolution of bilinear samples, each of them times its factor in ``mask``, written to ``output``.

    ``mask`` is (B, deformable_group · kernel_h · kernel_w, H, W), and the rest is as in :func:`deform_conv_forward`.
    """
    output.copy_(
        torchvision.ops.deform_conv2d(
            widen(input),
            _readable(offset),
            widen(weight),
            widen(bias) if with_bias else None,
            (stride_h, stride_w),
            (pad_h, pad_w),
            (dilation_h, dilation_w),
            widen(mask),
        )
    )


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """All gradients of :func:`modulated_deform_conv_forward`, written to the five tensors ``grad_…``."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    grads = _backward(grad_output, input, weight, offset, mask, geometry)
    grad_input.copy_(grads[0])
    grad_weight.copy_(grads[1])
    grad_offset.copy_(grads[2])
    grad_mask.copy_(grads[3])
    if with_bias:
        grad_bias.copy_(grads[4])


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    geometry: tuple[int, int, int, int, int, int, int, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the input, weight, offset, mask and bias by torchvision's operator."""
    bias = grad_output.new_zeros(len(weight))
    use_mask = mask is not None
    if mask is None:
        mask = grad_output.new_zeros(len(input), 1)
    tensors = widen(grad_output), widen(input), widen(weight), _readable(offset), widen(mask), widen(bias)
    return torch.ops.torchvision._deform_conv2d_backward(*tensors, *geometry, use_mask)


def _readable(offset: Tensor) -> Tensor:
    """Offsets that are no number point outside, where samples are 0, as for mmcv; torchvision would read anywhere."""
    return widen(offset).nan_to_num(nan=torch.inf)
