"""The sampling grids of regions of interest, which differ from RoI to RoI, as dense tensors of bounded size.

RoIs have shape (K, 5): index of the image in the batch, x1, y1, x2, y2.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# A part is about this many samples (64 MB in float32).
MAX_SAMPLES = 2**24


def parts(grids: Tensor, bins: int, key: Tensor | None = None) -> Iterator[tuple[Tensor, int, int]]:
    """Put RoIs with the same grid together.

    Args:
        grids: (K, 2), rows and columns of samples in each bin of a RoI.
        bins: Bins of one RoI, times channels.
        key: (K,), RoIs of different keys are kept apart.

    Yields:
        Indices of RoIs, and the rows and columns of their grid. RoIs with nothing to sample are left out.
    """
    key = torch.zeros_like(grids[:, 0]) if key is None else key.to(grids.dtype)
    kinds, members = torch.unique(torch.cat([grids, key[:, None]], dim=1), dim=0, return_inverse=True)
    for kind, (rows, columns, _) in enumerate(kinds.tolist()):
        if rows < 1 or columns < 1:
            continue
        indices = (members == kind).nonzero().flatten()
        for part in indices.split(max(1, MAX_SAMPLES // (rows * columns * bins))):
            yield part, rows, columns


def align_grids(
    rois: Tensor, height: int, width: int, spatial_scale: float, sampling_ratio: int, aligned: bool
) -> Tensor:
    """RoIAlign's samples per bin, (K, 2): as many as asked for, or about one for each pixel of the feature map."""
    if sampling_ratio > 0:
        return torch.full((len(rois), 2), sampling_ratio, device=rois.device)
    sizes = (rois[:, 3:] - rois[:, 1:3]).flip(1) * spatial_scale  # height, width
    if not aligned:
        sizes = sizes.clamp(min=1)
    return (sizes / sizes.new_tensor([height, width])).ceil().long()
