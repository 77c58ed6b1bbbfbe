"""Deformable convolution without modulation (DCN) and with modulation (DCNv2)."""

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from .determinism import allow_nondeterministic
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
    """Convolve bilinear samples and write the result to ``output``, (B, C_out, H, W).

    ``offset`` holds y and x of each kernel position, in pixels: (B, 2 · deformable_group · kH · kW, H, W).
    """
    input, weight, offset = widen(input), widen(weight), _replace_nan(offset)
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
    """Write the gradients with respect to the feature map and the offsets to ``grad_input`` and ``grad_offset``."""
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
    # The gradient does not depend on the values of the weight, so any tensor of its shape will do.
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
    """Convolve bilinear samples, each multiplied by its factor in ``mask``, and write the result to ``output``.

    ``mask`` is (B, deformable_group · kernel_h · kernel_w, H, W). Other shapes are as in :func:`deform_conv_forward`.
    """
    output.copy_(
        torchvision.ops.deform_conv2d(
            widen(input),
            _replace_nan(_truncate(offset, output.shape[2:])),
            widen(weight),
            widen(bias) if with_bias else None,
            (stride_h, stride_w),
            (pad_h, pad_w),
            (dilation_h, dilation_w),
            widen(_truncate(mask, output.shape[2:])),
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
    """Write all gradients of :func:`modulated_deform_conv_forward` to the five ``grad_…`` tensors."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    size = grad_output.shape[2:]
    grads = _backward(grad_output, input, weight, _truncate(offset, size), _truncate(mask, size), geometry)
    grad_input.copy_(grads[0])
    grad_weight.copy_(grads[1])
    for full_grad, grad in ((grad_offset, grads[2]), (grad_mask, grads[3])):
        unused = full_grad.shape[1:].numel() - grad.shape[1:].numel()
        full_grad.copy_(F.pad(grad.flatten(1), (0, unused)).view(full_grad.shape))
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
    """Return the gradients of input, weight, offset, mask and bias, computed by torchvision."""
    bias = grad_output.new_zeros(len(weight))
    use_mask = mask is not None
    if mask is None:
        mask = grad_output.new_zeros(len(input), 1)
    offset = _leave_border(_replace_nan(offset), weight.shape[2:], geometry[:6])
    tensors = widen(grad_output), widen(input), widen(weight), offset, widen(mask), widen(bias)
    with allow_nondeterministic():
        return torch.ops.torchvision._deform_conv2d_backward(*tensors, *geometry, use_mask)


def _replace_nan(offset: Tensor) -> Tensor:
    """Replace NaN by infinity, where samples are 0 as in mmcv. torchvision would read out of bounds at NaN."""
    return widen(offset).nan_to_num(nan=torch.inf)


def _truncate(tensor: Tensor, size: torch.Size) -> Tensor:
    """Keep the first values of each image, in the size of the output, if offsets or masks are larger than the output.

    mmcv's kernels read only these values, whatever the height and width. DyHead needs it for levels of equal size.
    """
    channels = tensor.shape[1]
    if tensor.shape[2:].numel() < size.numel():
        return tensor  # torchvision raises an error
    return tensor.flatten(1)[:, : channels * size.numel()].unflatten(1, (channels, *size))


def _leave_border(offset: Tensor, kernel: torch.Size, geometry: tuple[int, ...]) -> Tensor:
    """Replace offsets that point to row or column -1 by offsets that point to -2, for the backward pass.

    Samples are 0 at both. At -1 the derivative with respect to the offset is one-sided: mmcv uses the outer side, which
    is 0, and torchvision the inner side. A new layer with padding 1 has such samples, because its offsets are 0.
    """
    strides, paddings, dilations = geometry[:2], geometry[2:4], geometry[4:]
    # (B, deformable groups, kernel height, kernel width, y and x, H, W)
    taps = offset.unflatten(1, (-1, *kernel, 2))
    positions = []
    for axis in range(2):
        start = torch.arange(offset.shape[2 + axis], device=offset.device) * strides[axis] - paddings[axis]
        tap = torch.arange(kernel[axis], device=offset.device) * dilations[axis]
        base = tap[:, None, None, None] + start[:, None] if axis == 0 else tap[:, None, None] + start
        positions.append(taps[..., axis, :, :] + base)
    return torch.where(torch.stack(positions, dim=4) == -1, taps - 1, taps).flatten(1, 4)
