"""Deformable RoI pooling: RoIAlign in which each bin is shifted by its own offset."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .determinism import allow_nondeterministic
from .grids import align_grids, chunk_by_grid
from .precision import widen


def deform_roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    output: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Average bilinear samples and write the result to ``output``, (K, C, height, width).

    ``offset`` holds x and y of each bin's shift in units of ``gamma`` times the size of its RoI, (K, 2, height, width),
    or is empty.
    """
    features, corners, shift = _prepare(input, rois, offset, pooled_height, pooled_width, spatial_scale)
    grids = align_grids(rois.to(features.dtype), pooled_height, pooled_width, spatial_scale, sampling_ratio, True)
    for chunk, rows, columns in chunk_by_grid(grids, pooled_height * pooled_width * input.shape[1], rois[:, 0]):
        image = int(rois[chunk[0], 0])
        output[chunk] = _pool(features[image], corners[chunk], shift[chunk] * gamma, rows, columns).to(output.dtype)


def deform_roi_pool_backward(
    grad_output: Tensor,
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> None:
    """Write the gradients of :func:`deform_roi_pool_forward` to ``grad_input`` and ``grad_offset``."""
    features, corners, shift = _prepare(input, rois, offset, pooled_height, pooled_width, spatial_scale)
    total = torch.zeros_like(features)
    grids = align_grids(rois.to(features.dtype), pooled_height, pooled_width, spatial_scale, sampling_ratio, True)
    for chunk, rows, columns in chunk_by_grid(grids, pooled_height * pooled_width * input.shape[1], rois[:, 0]):
        image = int(rois[chunk[0], 0])
        variables = features[image].detach().requires_grad_(), shift[chunk].detach().requires_grad_()
        with torch.enable_grad():
            pooled = _pool(variables[0], corners[chunk], variables[1] * gamma, rows, columns)
        with allow_nondeterministic():
            grads = torch.autograd.grad(pooled, variables, grad_output[chunk].to(pooled.dtype))
        total[image] += grads[0]
        if offset.numel():
            grad_offset[chunk] = grads[1].to(grad_offset.dtype)
    grad_input.copy_(total)


def _prepare(
    input: Tensor, rois: Tensor, offset: Tensor, height: int, width: int, spatial_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return features, corners of the RoIs in pixels, (K, 4), and offsets, which are zeros if ``offset`` is empty."""
    features = widen(input)
    corners = rois[:, 1:].to(features.dtype) * spatial_scale - 0.5
    if offset.numel() == 0:
        offset = features.new_zeros(len(rois), 2, height, width)
    return features, corners, offset.to(features.dtype)


def _pool(features: Tensor, corners: Tensor, shift: Tensor, rows: int, columns: int) -> Tensor:
    """Average ``rows`` × ``columns`` samples of features (C, H, W) in each bin.

    Returns:
        (K, C, vertical bins, horizontal bins).
    """
    size = corners[:, 2:] - corners[:, :2]
    x = _positions(corners[:, 0], size[:, 0], shift.shape[3], columns)[:, None, None, :, :]
    y = _positions(corners[:, 1], size[:, 1], shift.shape[2], rows)[:, :, :, None, None]
    # (K, vertical bins, rows, horizontal bins, columns)
    x, y = torch.broadcast_tensors(
        x + (shift[:, 0] * size[:, 0, None, None])[:, :, None, :, None],
        y + (shift[:, 1] * size[:, 1, None, None])[:, :, None, :, None],
    )
    height, width = features.shape[1:]
    grid = torch.stack([2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1], dim=-1)
    samples = F.grid_sample(
        features[None], grid.reshape(1, -1, x.shape[3] * columns, 2), padding_mode='border', align_corners=True
    )
    samples = samples.reshape(len(features), *x.shape)
    # Up to one pixel outside, samples have the value of the border; beyond that they are 0.
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    return (samples * inside).mean(dim=(3, 5)).transpose(0, 1)


def _positions(start: Tensor, size: Tensor, bins: int, samples: int) -> Tensor:
    """Return the coordinates of the samples in evenly spaced bins, (K, bins, samples)."""
    steps = torch.arange(bins * samples, dtype=start.dtype, device=start.device).add(0.5) / (bins * samples)
    return (start[:, None] + steps * size[:, None]).unflatten(1, (bins, samples))
