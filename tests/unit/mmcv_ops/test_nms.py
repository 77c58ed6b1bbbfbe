import math

import numpy as np
import pytest
import torch
from mmcv.ops import batched_nms, nms, nms_match, soft_nms
from torch import Tensor

from mmevm.mmcv_ops.ext import line_nms_forward

pytestmark = pytest.mark.usefixtures('each_device')


def random_boxes(number: int) -> tuple[Tensor, Tensor]:
    corners = torch.rand(number, 2) * 40
    return torch.cat([corners, corners + torch.rand(number, 2) * 30 + 1], dim=1), torch.rand(number)


def iou(first: Tensor, second: Tensor, offset: int) -> float:
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = first.tolist(), second.tolist()
    width = max(0, min(ax2, bx2) - max(ax1, bx1) + offset)
    height = max(0, min(ay2, by2) - max(ay1, by1) + offset)
    areas = (ax2 - ax1 + offset) * (ay2 - ay1 + offset) + (bx2 - bx1 + offset) * (by2 - by1 + offset)
    return width * height / (areas - width * height)


def brute_force_nms(boxes: Tensor, scores: Tensor, threshold: float, offset: int) -> list[int]:
    kept = []
    for i in scores.argsort(descending=True).tolist():
        if all(iou(boxes[i], boxes[j], offset) <= threshold for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('threshold', [0.2, 0.5])
def test_nms_equals_brute_force(offset: int, threshold: float) -> None:
    boxes, scores = random_boxes(60)
    dets, kept = nms(boxes, scores, threshold, offset=offset)
    assert kept.tolist() == brute_force_nms(boxes, scores, threshold, offset)
    assert torch.equal(dets, torch.cat([boxes, scores[:, None]], dim=1)[kept])


def test_nms_offset_changes_overlap() -> None:
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 5, 9, 14]])
    scores = torch.tensor([0.9, 0.8])
    assert len(nms(boxes, scores, 0.3, offset=0)[1]) == 2  # 36 / 126
    assert len(nms(boxes, scores, 0.3, offset=1)[1]) == 1  # 50 / 150


def test_nms_score_threshold_and_max_num() -> None:
    boxes, scores = random_boxes(60)
    _, kept = nms(boxes, scores, 0.5, score_threshold=0.4, max_num=5)
    good = (scores > 0.4).nonzero().flatten()
    expected = good[brute_force_nms(boxes[good], scores[good], 0.5, 0)][:5]
    assert kept.tolist() == expected.tolist()


@pytest.mark.parametrize('function', [nms, soft_nms])
def test_empty_boxes(function) -> None:
    dets, kept = function(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert dets.shape == (0, 5)
    assert kept.shape == (0,)
    assert kept.dtype == torch.long


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_nms_in_half_precision(dtype: torch.dtype) -> None:
    boxes = random_boxes(40)[0].to(dtype)
    scores = torch.linspace(0.1, 0.9, 40)[torch.randperm(40)].to(dtype)
    dets, kept = nms(boxes, scores, 0.5)
    assert dets.dtype == dtype
    assert kept.tolist() == brute_force_nms(boxes.float(), scores.float(), 0.5, 0)


def test_batched_nms_suppresses_within_classes() -> None:
    boxes, scores = random_boxes(60)
    classes = torch.randint(0, 3, (60,))
    dets, kept = batched_nms(boxes, scores, classes, dict(type='nms', iou_threshold=0.3))
    expected = set()
    for label in range(3):
        members = (classes == label).nonzero().flatten()
        expected |= set(members[brute_force_nms(boxes[members], scores[members], 0.3, 0)].tolist())
    assert set(kept.tolist()) == expected
    assert (dets[:-1, 4] >= dets[1:, 4]).all()


def brute_force_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset):
    candidates = dict(enumerate(scores.tolist()))
    kept = []
    while candidates:
        best = max(candidates, key=candidates.get)
        kept.append((best, candidates.pop(best)))
        for i in list(candidates):
            overlap = iou(boxes[best], boxes[i], offset)
            if method == 'gaussian':
                candidates[i] *= math.exp(-(overlap**2) / sigma)
            elif overlap >= threshold:
                candidates[i] *= 0 if method == 'naive' else 1 - overlap
            if candidates[i] < min_score:
                del candidates[i]
    return kept


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
def test_soft_nms_equals_brute_force(method: str, offset: int) -> None:
    boxes, scores = random_boxes(40)
    settings = dict(sigma=0.4, min_score=0.05, method=method, offset=offset)
    dets, kept = soft_nms(boxes, scores, 0.3, **settings)
    expected = brute_force_soft_nms(boxes, scores, 0.3, **settings)
    assert kept.tolist() == [index for index, _ in expected]
    assert torch.equal(dets[:, :4], boxes[kept])
    torch.testing.assert_close(dets[:, 4], torch.tensor([score for _, score in expected]))


def test_soft_nms_is_finite_for_boxes_without_area() -> None:
    dets, _ = soft_nms(torch.tensor([[1.0, 1, 1, 1]] * 3), torch.tensor([0.9, 0.8, 0.7]), method='gaussian')
    assert dets[:, 4].tolist() == pytest.approx([0.9, 0.8, 0.7])


@pytest.mark.parametrize(('method', 'kept'), [('naive', [0.875, 0.125]), ('linear', [0.875, 0.25, 0.125])])
def test_soft_nms_at_iou_threshold_and_min_score(method: str, kept: list[float]) -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 2], [8, 8, 9, 9]])  # IoU 1/2
    scores = torch.tensor([0.875, 0.5, 0.125])
    dets, _ = soft_nms(boxes, scores, 0.5, min_score=0.125, method=method)
    assert dets[:, 4].tolist() == kept


def test_soft_nms_accepts_numpy_arrays() -> None:
    boxes, scores = random_boxes(20)
    dets, kept = soft_nms(boxes.cpu().numpy(), scores.cpu().numpy(), 0.3)
    assert isinstance(dets, np.ndarray)
    np.testing.assert_array_equal(kept, soft_nms(boxes, scores, 0.3)[1].cpu().numpy())


def test_nms_match_equals_brute_force() -> None:
    boxes, scores = random_boxes(60)
    groups = nms_match(torch.cat([boxes, scores[:, None]], dim=1), 0.3)
    left = scores.argsort(descending=True).tolist()
    expected = []
    while left:
        group = [i for i in left if i == left[0] or iou(boxes[left[0]], boxes[i], 0) >= 0.3]
        expected.append(group)
        left = [i for i in left if i not in group]
    assert [group.tolist() for group in groups] == expected
    assert any(len(group) > 1 for group in groups)
    assert nms_match(torch.zeros(0, 5), 0.3) == []


def test_nms_match_suppresses_at_threshold() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4, 0.9], [0, 0, 4, 2, 0.8], [0, 0, 4, 1, 0.7]])  # IoU 1/2 between the first two
    assert [group.tolist() for group in nms_match(boxes, 0.5)] == [[0, 1], [2]]


@pytest.mark.parametrize('top_k', [2, 100])
def test_line_nms_equals_brute_force(top_k: int) -> None:
    rows = 12
    number_of_lanes = 150
    starts = torch.rand(number_of_lanes, 4) * 1.4 - 0.2
    lengths = torch.randint(0, rows, (number_of_lanes, 1))
    lanes = torch.cat([starts, lengths, torch.rand(number_of_lanes, rows) * 100], dim=1)
    scores = torch.rand(number_of_lanes)

    def close(a: list[float], b: list[float]) -> bool:
        start = max(int(a[2] * (rows - 1) + 0.5), int(b[2] * (rows - 1) + 0.5))
        end = min(*(int(lane[2] * (rows - 1) + 0.5) + int(lane[4]) - 1 for lane in (a, b)), rows - 1)
        shared = range(start, end + 1)
        return start >= 0 and len(shared) > 0 and sum(abs(a[5 + i] - b[5 + i]) for i in shared) / len(shared) < 35

    left, kept, parents = scores.argsort(descending=True).tolist(), [], [0] * number_of_lanes
    while left and len(kept) < top_k:
        best = left[0]
        kept.append(best)
        group = [i for i in left if i == best or close(lanes[best].tolist(), lanes[i].tolist())]
        for i in group:
            parents[i] = len(kept)
        left = [i for i in left if i not in group]

    keep, number, parent = line_nms_forward(lanes, scores, 35, top_k)
    assert keep.dtype == parent.dtype == torch.long
    assert number == len(kept) < number_of_lanes
    assert keep.tolist() == kept + [0] * (number_of_lanes - len(kept))
    assert parent.tolist() == parents


@pytest.mark.parametrize(('start', 'kept'), [(0.1, 1), (-0.5, 2)])
def test_line_nms_keeps_lanes_that_start_outside_image(start: float, kept: int) -> None:
    lanes = torch.zeros(2, 5 + 12)
    lanes[:, 2], lanes[:, 4] = start, 10
    assert line_nms_forward(lanes, torch.rand(2), 35, 10)[1] == kept
