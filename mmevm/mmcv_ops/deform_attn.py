"""Multi-scale deformable attention: each query samples a few points of every level of a feature pyramid."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .determinism import allow_nondeterministic
from .precision import widen


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Return the weighted sum of bilinear samples.

    Args:
        value: (B, keys, heads, channels), the concatenated levels.
        value_spatial_shapes: (levels, 2), height and width of each level.
        value_level_start_index: (levels,), index of the first key of each level.
        sampling_locations: (B, queries, heads, levels, points, 2), x and y from 0 to 1.
        attention_weights: (B, queries, heads, levels, points).
        im2col_step: Unused.

    Returns:
        (B, queries, heads · channels).
    """
    batch, _, heads, channels = value.shape
    output = widen(value).new_zeros(batch, sampling_locations.shape[1], heads * channels)
    for level, shape, keys in _levels(value_spatial_shapes, value_level_start_index):
        output = output + _attend(
            widen(value[:, keys]),
            widen(sampling_locations[:, :, :, level]),
            widen(attention_weights[:, :, :, level]),
            shape,
        )
    return output.to(value.dtype)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Write the gradients of :func:`ms_deform_attn_forward` to the three ``grad_…`` tensors."""
    for level, shape, keys in _levels(value_spatial_shapes, value_level_start_index):
        index = (slice(None), slice(None), slice(None), level)
        parts = (value[:, keys], sampling_locations[index], attention_weights[index])
        inputs = [widen(tensor).detach().requires_grad_() for tensor in parts]
        with torch.enable_grad():
            output = _attend(inputs[0], inputs[1], inputs[2], shape)
        with allow_nondeterministic():
            grads = torch.autograd.grad(output, inputs, grad_output.to(output.dtype))
        grad_value[:, keys] = grads[0]
        grad_sampling_loc[index] = grads[1]
        grad_attn_weight[index] = grads[2]


def _levels(shapes: Tensor, starts: Tensor) -> list[tuple[int, tuple[int, int], slice]]:
    """Return index, (height, width) and keys of each level.

    Levels are computed one at a time, so that the largest one sets the memory use.
    """
    return [
        (level, (height, width), slice(start, start + height * width))
        for level, ((height, width), start) in enumerate(zip(shapes.tolist(), starts.tolist(), strict=True))
    ]


def _attend(value: Tensor, locations: Tensor, weights: Tensor, shape: tuple[int, int]) -> Tensor:
    """Attend to one level: (B, H · W, heads, channels) → (B, queries, heads · channels)."""
    batch, queries, heads, points, _ = locations.shape
    maps = value.permute(0, 2, 3, 1).reshape(batch * heads, -1, *shape)  # (B · heads, channels, H, W)
    grid = 2 * locations.transpose(1, 2).reshape(batch * heads, queries, points, 2) - 1
    samples = F.grid_sample(maps, grid, align_corners=False)  # (B · heads, channels, queries, points)
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, points)
    attended = (samples * weights).sum(dim=3)  # (B · heads, channels, queries)
    return attended.reshape(batch, -1, queries).transpose(1, 2)
