"""CARAFE upsampling: each output pixel is a weighted sum of a window of input pixels, with its own weights."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import widen


def carafe_naive_forward(
    features: Tensor, masks: Tensor, output: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> None:
    """Upsample features (B, C, H, W) and write them to ``output``, (B, C, H · scale, W · scale).

    ``masks`` holds the weights, (B, groups · kernel², H · scale, W · scale). The channels of a group share them.
    """
    batch, channels, height, width = features.shape
    grouped = (batch, group_size, channels // group_size, height, 1, width, 1)
    padded = F.pad(widen(features), [kernel_size // 2] * 4)
    total = padded.new_zeros(batch, group_size, channels // group_size, height, scale_factor, width, scale_factor)
    for tap, window in _taps(kernel_size, height, width):
        total.addcmul_(padded[window].reshape(grouped), _weights(masks, tap, kernel_size, group_size, scale_factor))
    output.copy_(total.reshape(output.shape))


def carafe_naive_backward(
    top_grad: Tensor,
    features: Tensor,
    masks: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Write the gradients of :func:`carafe_naive_forward` to ``bottom_grad`` and ``mask_grad``."""
    batch, channels, height, width = features.shape
    grouped = (batch, group_size, channels // group_size, height, 1, width, 1)
    grad = widen(top_grad).reshape(*grouped[:4], scale_factor, width, scale_factor)
    padded = F.pad(widen(features), [kernel_size // 2] * 4)
    grad_padded = torch.zeros_like(padded)
    grad_weights = mask_grad.view(batch, group_size, kernel_size**2, *masks.shape[2:])
    for tap, window in _taps(kernel_size, height, width):
        weights = _weights(masks, tap, kernel_size, group_size, scale_factor)
        grad_padded[window] += (grad * weights).sum(dim=(4, 6)).flatten(1, 2)
        grad_tap = (grad * padded[window].reshape(grouped)).sum(dim=2)
        grad_weights[:, :, tap] = grad_tap.flatten(2, 3).flatten(3, 4)
    inner = slice(kernel_size // 2, None)
    bottom_grad.copy_(grad_padded[:, :, inner, inner][:, :, :height, :width])


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Do the same as :func:`carafe_naive_forward`, and copy the features to ``rfeatures`` for the backward pass."""
    rfeatures.copy_(features)
    carafe_naive_forward(features, masks, output, kernel_size, group_size, scale_factor)


def carafe_backward(
    top_grad: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rtop_grad: Tensor,
    rbottom_grad_hs: Tensor,
    rbottom_grad: Tensor,
    rmask_grad: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Write the gradients of :func:`carafe_forward` to ``bottom_grad`` and ``mask_grad``."""
    carafe_naive_backward(top_grad, rfeatures, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor)


def _taps(kernel_size: int, height: int, width: int) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """Yield each position of the window and the index that selects its pixels from the padded features.

    One position at a time, because all positions together need kernel² times the memory of the features.
    """
    for tap in range(kernel_size**2):
        y, x = divmod(tap, kernel_size)
        yield tap, (slice(None), slice(None), slice(y, y + height), slice(x, x + width))


def _weights(masks: Tensor, tap: int, kernel_size: int, group_size: int, scale_factor: int) -> Tensor:
    """Return the weights of one window position, (B, groups, 1, H, scale, W, scale)."""
    weights = widen(masks.unflatten(1, (group_size, kernel_size**2))[:, :, tap])
    height, width = weights.shape[2:]
    return weights.reshape(
        *weights.shape[:2], 1, height // scale_factor, scale_factor, width // scale_factor, scale_factor
    )
