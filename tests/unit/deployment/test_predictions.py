"""How far exported detections are from those of MMDetection."""

import pytest
import torch

from mmevm.deployment.predictions import compare_detections, compare_masks


def detections(count=40):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, count, 2, generator=generator) * 100
    dets = torch.cat([corners, corners + 20, torch.rand(2, count, 1, generator=generator)], -1)
    return dets, torch.randint(3, (2, count), generator=generator)


def test_compare_detections():
    dets, labels = detections()
    assert compare_detections((dets, labels), (dets, labels)) == [0, 0]
    order = torch.randperm(40)
    assert compare_detections((dets[:, order], labels[:, order]), (dets, labels)) == [0, 0]
    largest = dets[..., :4].max().item()
    moved = dets + torch.tensor([0, 0, 0.02 * largest, 0, 0])
    assert compare_detections((moved, labels), (dets, labels)) == [pytest.approx(0.02, rel=1e-4)] * 2
    assert compare_detections((dets * torch.tensor([1, 1, 1, 1, 0.9]), labels), (dets, labels))[0] == pytest.approx(
        0.1, rel=0.1
    )


@pytest.mark.parametrize('lost', [2, 8])
def test_compare_detections_accepts_a_few_without_counterpart(lost):
    dets, labels = detections()
    fewer = labels.clone()
    fewer[0, :lost] = -1
    others = labels.clone()
    others[0, :lost] = 3
    for changed in (fewer, others):
        for one, other in ((changed, labels), (labels, changed)):
            difference, again = compare_detections((dets, one), (dets, other))
            assert difference == again
            assert difference == 0 if lost == 2 else difference > 0.02


def test_compare_detections_with_empty_or_nan_detections():
    dets, labels = detections()
    nothing = torch.full_like(labels, -1)
    assert compare_detections((dets, nothing), (dets, nothing)) == [0, 0]
    assert compare_detections((dets, labels), (dets, nothing)) == [float('inf')] * 2
    assert compare_detections((dets, nothing), (dets, labels)) == [float('inf')] * 2
    assert compare_detections((dets * float('nan'), labels), (dets, labels)) == [float('inf')] * 2


def test_compare_masks():
    """One of 100 pixels differs; the objects may be in any order."""
    dets, labels = (x[:, :2] for x in detections())
    masks = torch.zeros(2, 2, 20, 20, dtype=torch.bool)
    masks[0, 0, :10, :5] = masks[1, 1, 5:10, 10:20] = True
    order = torch.tensor([1, 0])
    assert compare_masks((dets[:, order], labels[:, order], masks[:, order]), (dets, labels, masks)) == 0
    changed = masks.clone()
    changed[0, 0, 0, 0] = False
    for one, other in ((changed, masks), (masks, changed)):
        assert compare_masks((dets, labels, one), (dets, labels, other)) == pytest.approx(0.01)
    assert compare_masks((dets, torch.full_like(labels, -1), masks), (dets, labels, masks)) == 0
