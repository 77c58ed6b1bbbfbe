"""Group RoIs by the size of their sampling grid, so that each group is a dense tensor of bounded size.

RoIs have shape (K, 5): index of the image in the batch, x1, y1, x2, y2 in pixels of the input image.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Samples in a chunk, at most, unless it is a single RoI (64 MB in float32).
MAX_SAMPLES = 2**24


def chunk_by_grid(grids: Tensor, bins: int, key: Tensor | None = None) -> Iterator[tuple[Tensor, int, int]]:
    """Split RoIs into chunks with the same grid.

    Args:
        grids: (K, 2), rows and columns of samples in each bin of a RoI.
        bins: Number of bins of one RoI, times channels.
        key: (K,); RoIs with different keys are in different chunks.

    Yields:
        Indices of the RoIs, rows and columns of their grid. RoIs without samples are skipped.
    """
    key = torch.zeros_like(grids[:, 0]) if key is None else key.to(grids.dtype)
    kinds, members = torch.unique(torch.cat([grids, key[:, None]], dim=1), dim=0, return_inverse=True)
    for kind, (rows, columns, _) in enumerate(kinds.tolist()):
        if rows < 1 or columns < 1:
            continue
        indices = (members == kind).nonzero().flatten()
        for chunk in indices.split(max(1, MAX_SAMPLES // (rows * columns * bins))):
            yield chunk, rows, columns


def align_grids(
    rois: Tensor, height: int, width: int, spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    """Return the number of RoIAlign's samples in each bin, (K, 2).

    It is ``sampling_ratio``, or about one sample per pixel of the feature map if that is 0.
    """
    if sampling_ratio > 0:
        return torch.full((len(rois), 2), sampling_ratio, device=rois.device)
    sizes = (rois[:, 3:] - rois[:, 1:3]).flip(1) * spatial_scale  # height, width
    if not aligned:
        sizes = sizes.clamp(min=1)
    return (sizes / sizes.new_tensor([height, width])).ceil().long()
