"""RoIAlign (average and maximum) and RoIPool."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401 - registers torch.ops.torchvision
from torch import Tensor

from .determinism import allow_nondeterministic
from .grids import align_grids, chunk_by_grid
from .precision import widen

# torch.compiler.is_compiling is missing in torch 2.1.
_is_compiling = torch.compiler.is_compiling if hasattr(torch.compiler, 'is_compiling') else torch._utils.is_compiling

# Number of pooled elements for each thread, below which starting it takes more time than it saves.
_MIN_ELEMENTS = 2**19


def _in_threads(function: Callable[[Tensor], Tensor], x: Tensor, dim: int, elements: Callable[[], int]) -> Tensor:
    """Call a function with parts of a tensor, each in a thread, and concatenate the results.

    torchvision's RoIAlign uses one thread on a CPU. The result does not depend on the number of threads.

    Args:
        function: Maps a part to its result.
        x: The tensor.
        dim: Dimension in which ``x`` and the result are split.
        elements: Returns the number of pooled elements.
    """
    if x.device.type != 'cpu' or torch.jit.is_tracing() or _is_compiling():
        return function(x)
    threads = min(torch.get_num_threads(), x.shape[dim], elements() // _MIN_ELEMENTS)
    if threads < 2:
        return function(x)

    @torch.no_grad()  # each thread has a grad mode of its own
    def call(part: Tensor) -> Tensor:
        return function(part.contiguous())

    with ThreadPoolExecutor(threads) as pool:
        return torch.cat(list(pool.map(call, x.chunk(threads, dim))), dim)


def _roi_align(input: Tensor, rois: Tensor, scale: float, height: int, width: int, *args: float) -> Tensor:
    def forward(part: Tensor) -> Tensor:
        return torch.ops.torchvision.roi_align(input, part, scale, height, width, *args)

    return _in_threads(forward, rois, 0, lambda: len(rois) * input.shape[1] * height * width)


def _roi_align_backward(
    grad_output: Tensor, rois: Tensor, scale: float, height: int, width: int, shape: torch.Size, *args: float
) -> Tensor:
    def backward(part: Tensor) -> Tensor:
        size = (shape[0], part.shape[1], *shape[2:])
        return torch.ops.torchvision._roi_align_backward(part, rois, scale, height, width, *size, *args)

    return _in_threads(backward, grad_output, 1, grad_output.numel)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the average (``pool_mode`` 1) or maximum (0) of bilinear samples to ``output``, (K, C, height, width).

    ``argmax_y`` and ``argmax_x`` receive the row and column of the largest sample in the grid of its bin, for the
    backward pass. The maximum of a bin without samples stays 0, the initial value of ``output``.
    """
    input = widen(input).contiguous()  # torchvision copies it otherwise, in each thread
    rois = rois.to(input.dtype)
    if pool_mode == 1:
        output.copy_(_roi_align(input, rois, spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned))
        return

    grids = align_grids(rois, aligned_height, aligned_width, spatial_scale, sampling_ratio, aligned)
    for chunk, rows, columns in chunk_by_grid(grids, aligned_height * aligned_width * input.shape[1]):
        # One sample per bin of a `rows` × `columns` finer grid gives exactly the samples of the coarse bins.
        fine_height, fine_width = aligned_height * rows, aligned_width * columns
        samples = _roi_align(input, rois[chunk], spatial_scale, fine_height, fine_width, 1, aligned)
        maximum, index = F.max_pool2d(samples, (rows, columns), return_indices=True)
        output[chunk] = maximum.to(output.dtype)
        argmax_y[chunk] = (index // fine_width % rows).to(argmax_y.dtype)
        argmax_x[chunk] = (index % fine_width % columns).to(argmax_x.dtype)


@allow_nondeterministic()
def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the gradient of :func:`roi_align_forward` with respect to the feature map to ``grad_input``."""
    grad_output = widen(grad_output)
    rois = rois.to(grad_output.dtype)
    if pool_mode == 1:
        bins = (aligned_height, aligned_width)
        grad_input.copy_(
            _roi_align_backward(grad_output, rois, spatial_scale, *bins, grad_input.shape, sampling_ratio, aligned)
        )
        return

    total = torch.zeros_like(grad_input, dtype=grad_output.dtype)
    grids = align_grids(rois, aligned_height, aligned_width, spatial_scale, sampling_ratio, aligned)
    for chunk, rows, columns in chunk_by_grid(grids, aligned_height * aligned_width * grad_input.shape[1]):
        fine_height, fine_width = aligned_height * rows, aligned_width * columns
        y = torch.arange(aligned_height, device=rois.device)[:, None] * rows + argmax_y[chunk].long()
        x = torch.arange(aligned_width, device=rois.device) * columns + argmax_x[chunk].long()
        grad_samples = grad_output.new_zeros(len(chunk), grad_input.shape[1], fine_height * fine_width)
        grad_samples.scatter_(2, (y * fine_width + x).flatten(2), grad_output[chunk].flatten(2))
        grad_samples = grad_samples.unflatten(2, (fine_height, fine_width))
        total += _roi_align_backward(
            grad_samples, rois[chunk], spatial_scale, fine_height, fine_width, grad_input.shape, 1, aligned
        )
    grad_input.copy_(total)


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Write the maximum over the pixels that each bin touches to ``output``, (K, C, height, width).

    Unlike torchvision, mmcv does not round RoIs to whole pixels first. ``argmax`` receives the index of the largest
    pixel in its channel, or -1 for a bin without pixels, whose output stays 0.
    """
    argmax.fill_(-1)
    rois = widen(rois)
    height, width = input.shape[2:]
    images = rois[:, 0].long()
    x1, y1, x2, y2 = (rois[:, 1:] + rois.new_tensor([0, 0, 1, 1])).mul(spatial_scale).unbind(dim=1)
    top, bottom = _pixel_ranges(y1, y2, pooled_height, height)  # (K, pooled_height)
    left, right = _pixel_ranges(x1, x2, pooled_width, width)  # (K, pooled_width)
    valid = ((x2 > x1) & (y2 > y1))[:, None, None] & (bottom > top)[:, :, None] & (right > left)[:, None, :]

    grids = torch.stack([(bottom - top).amax(dim=1), (right - left).amax(dim=1)], dim=1)
    for chunk, rows, columns in chunk_by_grid(grids, pooled_height * pooled_width * input.shape[1]):
        # Smaller bins repeat their last row or column.
        y = torch.minimum(top[chunk, :, None] + torch.arange(rows, device=rois.device), bottom[chunk, :, None] - 1)
        x = torch.minimum(left[chunk, :, None] + torch.arange(columns, device=rois.device), right[chunk, :, None] - 1)
        y, x = y.clamp(min=0)[:, :, None, :, None], x.clamp(min=0)[:, None, :, None, :]
        pixels = input[images[chunk, None, None, None, None], :, y, x]  # (chunk, ph, pw, rows, columns, C)
        maximum, index = pixels.flatten(3, 4).max(dim=3)  # (chunk, ph, pw, C)
        pixel = (y * width + x).flatten(3).gather(3, index)
        empty = ~valid[chunk, :, :, None]
        output[chunk] = maximum.masked_fill(empty, 0).permute(0, 3, 1, 2)
        argmax[chunk] = pixel.masked_fill(empty, -1).permute(0, 3, 1, 2).to(argmax.dtype)


def _pixel_ranges(start: Tensor, end: Tensor, bins: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the first pixel of each bin and the first pixel after it, both (K, bins)."""
    edges = torch.arange(bins + 1, device=start.device) * ((end - start) / bins)[:, None] + start[:, None]
    return edges[:, :-1].floor().long().clamp(0, size), edges[:, 1:].ceil().long().clamp(0, size)


@allow_nondeterministic()
def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Write the gradient of :func:`roi_pool_forward` with respect to the feature map to ``grad_input``."""
    grad_output = widen(grad_output)
    # torchvision stores argmax in the same format, and its backward pass needs nothing else.
    grad_input.copy_(
        torch.ops.torchvision._roi_pool_backward(
            grad_output,
            rois.to(grad_output.dtype),
            argmax,
            spatial_scale,
            pooled_height,
            pooled_width,
            *grad_input.shape,
        )
    )
