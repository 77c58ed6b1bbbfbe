"""Non-maximum suppression (NMS): hard, soft, with groups, and of lanes."""

from collections.abc import Callable, Iterator

import torch
import torchvision
from torch import Tensor

from .precision import widen


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Return the indices of the kept boxes in descending order of score. The width of a box is ``x2 - x1 + offset``."""
    boxes = _move_corner(widen(boxes), offset)
    return torchvision.ops.nms(boxes, scores.to(boxes.dtype), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Lower the scores of boxes that overlap a box with a higher score, and drop those that fall below ``min_score``.

    Args:
        boxes: (N, 4) as x1, y1, x2, y2 in pixels.
        scores: (N,).
        dets: Output, (N, 5). The first rows receive the kept boxes and their new scores, in descending order.
        iou_threshold: The lowest IoU at which methods 0 and 1 lower scores.
        sigma: Width of the Gaussian of method 2.
        min_score: The lowest score to keep.
        method: 0 lowers scores to zero, 1 multiplies by ``1 - IoU``, 2 multiplies by ``exp(-IoU² / sigma)``.
        offset: Added to widths and heights, in pixels: the width of a box is ``x2 - x1 + offset``.

    Returns:
        Indices of the kept boxes.
    """
    moved = _move_corner(widen(boxes), offset)
    scores = scores.to(moved.dtype)
    alive = torch.ones_like(scores, dtype=torch.bool)
    kept: list[Tensor] = []
    while alive.any():
        best = scores.masked_fill(~alive, -torch.inf).argmax()
        dets[len(kept), :4], dets[len(kept), 4] = boxes[best], scores[best]
        kept.append(best)
        alive[best] = False

        iou = torchvision.ops.box_iou(moved[best, None], moved)[0].nan_to_num(0)
        if method == 0:
            weights = (iou < iou_threshold).to(iou.dtype)
        elif method == 1:
            weights = torch.where(iou < iou_threshold, 1, 1 - iou)
        else:
            weights = torch.exp(-(iou**2) / sigma)
        scores = scores.where(~alive, scores * weights)
        alive &= scores >= min_score
    return torch.stack(kept) if kept else torch.empty(0, dtype=torch.long, device=boxes.device)


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Suppress (N, 5) boxes with scores, and return groups: the index of each kept box and those it suppressed."""
    boxes, scores = widen(dets).split([4, 1], dim=1)

    def suppresses(best: Tensor, rest: Tensor) -> Tensor:
        return torchvision.ops.box_iou(boxes[best, None], boxes[rest])[0] >= iou_threshold

    order = scores.flatten().argsort(descending=True, stable=True)
    return [[int(best), *suppressed.tolist()] for best, suppressed in _greedy(order, suppresses)]


def line_nms_forward(boxes: Tensor, scores: Tensor, overlap: float, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Suppress lanes whose mean distance to a lane with a higher score, over their common rows, is below ``overlap``.

    Args:
        boxes: (N, 5 + rows): two scores, start as a fraction of the image height, x of the start, length in rows, and
            x at each row.
        scores: (N,).
        overlap: Distance threshold, in the units of x.
        top_k: Maximum number of lanes to keep.

    Returns:
        Indices of the kept lanes, padded with 0 to (N,); their number; and for each lane one plus the position of the
        kept lane in whose group it is, or 0 if it is in none.
    """
    boxes = widen(boxes)
    xs = boxes[:, 5:]
    rows = torch.arange(xs.shape[1], device=boxes.device)
    starts = (boxes[:, 2] * (len(rows) - 1) + 0.5).long()
    ends = (starts + boxes[:, 4].long() - 1).clamp(max=len(rows) - 1)

    def suppresses(best: Tensor, rest: Tensor) -> Tensor:
        start, end = starts[rest].maximum(starts[best]), ends[rest].minimum(ends[best])
        shared = (rows >= start[:, None]) & (rows <= end[:, None])
        distance = (xs[rest] - xs[best]).abs().masked_fill(~shared, 0).sum(dim=1)
        return (start >= 0) & (distance < overlap * (end - start + 1))

    keep = torch.zeros(len(boxes), dtype=torch.long, device=boxes.device)
    parents = torch.zeros_like(keep)
    number = 0
    for best, suppressed in _greedy(scores.argsort(descending=True, stable=True), suppresses):
        keep[number] = best
        number += 1
        parents[best] = number
        parents[suppressed] = number
        if number == top_k:
            break
    return keep, torch.tensor(number, device=boxes.device), parents


def _move_corner(boxes: Tensor, offset: int) -> Tensor:
    """Move the lower right corner by the offset, which adds it to widths, intersections and areas alike."""
    return boxes + boxes.new_tensor([0, 0, offset, offset])


def _greedy(order: Tensor, suppresses: Callable[[Tensor, Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the first index of ``order`` and those it suppresses, then continue with the others."""
    while len(order):
        best, rest = order[0], order[1:]
        hit = suppresses(best, rest)
        yield best, rest[hit]
        order = rest[~hit]
