"""Batch normalization in steps, between which mmcv's MMSyncBN exchanges statistics.

Feature maps have shape (B, C, pixels), in any precision; statistics have shape (C,), in float32.
"""

from torch import Tensor


def sync_bn_forward_mean(input: Tensor, mean: Tensor) -> None:
    """Write the mean of each channel to ``mean``."""
    mean.copy_(input.to(mean.dtype).mean(dim=(0, 2)))


def sync_bn_forward_var(input: Tensor, mean: Tensor, var: Tensor) -> None:
    """Write the mean squared deviation from ``mean`` to ``var``."""
    var.copy_((input.to(var.dtype) - mean[:, None]).square().mean(dim=(0, 2)))


def sync_bn_forward_output(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    norm: Tensor,
    std: Tensor,
    output: Tensor,
    eps: float,
    momentum: float | Tensor,
    group_size: int,
) -> None:
    """Write the normalized input to ``norm`` and the affine result to ``output``; update ``std`` and running stats."""
    std.copy_((var + eps).sqrt())
    norm.copy_((input.to(norm.dtype) - mean[:, None]) / std[:, None])
    output.copy_(norm * weight[:, None] + bias[:, None])
    running_mean += momentum * (mean - running_mean)
    count = input.shape[0] * input.shape[2] * group_size
    running_var += momentum * (var * (count / max(count - 1, 1)) - running_var)


def sync_bn_backward_param(grad_output: Tensor, norm: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    """Write the gradients with respect to weight and bias to ``grad_weight`` and ``grad_bias``."""
    grad_output = grad_output.to(norm.dtype)
    grad_weight.copy_((grad_output * norm).sum(dim=(0, 2)))
    grad_bias.copy_(grad_output.sum(dim=(0, 2)))


def sync_bn_backward_data(
    grad_output: Tensor,
    weight: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    norm: Tensor,
    std: Tensor,
    grad_input: Tensor,
) -> None:
    """Write the gradient with respect to the feature map to ``grad_input``."""
    count = norm.shape[0] * norm.shape[2]
    centered = grad_output.to(norm.dtype) - (grad_weight[:, None] * norm + grad_bias[:, None]) / count
    grad_input.copy_(centered * (weight / std)[:, None])
