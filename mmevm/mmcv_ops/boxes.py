"""Overlap of bounding boxes."""

import torch
from torch import Tensor

from .precision import widen


def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool, offset: int) -> None:
    """Write the intersection over union of boxes (``mode`` 0), or over the first box's area (``mode`` 1), to ``ious``.

    Args:
        bboxes1: (M, 4) as x1, y1, x2, y2 in pixels.
        bboxes2: (N, 4); with ``aligned``, N = M and box i is compared with box i only.
        ious: Output, (M, N), or (M,) with ``aligned``.
        mode: 0 or 1.
        aligned: Whether the boxes are given as pairs.
        offset: Added to widths and heights, in pixels: the width of a box is ``x2 - x1 + offset``.
    """
    first, second = widen(bboxes1), widen(bboxes2)
    if not aligned:
        first = first[:, None]
    top_left = torch.maximum(first[..., :2], second[..., :2])
    bottom_right = torch.minimum(first[..., 2:], second[..., 2:])
    intersection = (bottom_right - top_left + offset).clamp(min=0).prod(dim=-1)
    base = _area(first, offset)
    if mode == 0:
        base = base + _area(second, offset) - intersection
    ious.copy_(intersection / base.clamp(min=offset))


def _area(boxes: Tensor, offset: int) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2] + offset).prod(dim=-1)
