import pytest
import torch
from mmcv.ops import bbox_overlaps

pytestmark = pytest.mark.usefixtures('each_device')


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('mode', ['iou', 'iof'])
@pytest.mark.parametrize('aligned', [False, True])
def test_bbox_overlaps_equal_pixel_counts(mode: str, aligned: bool, offset: int) -> None:
    corners = torch.randint(0, 8, (2, 6, 2))
    boxes = torch.cat([corners, corners + torch.randint(1, 9, (2, 6, 2))], dim=2)

    def pixels(box: list[int]) -> set[tuple[int, int]]:
        x1, y1, x2, y2 = box
        return {(x, y) for x in range(x1, x2 + offset) for y in range(y1, y2 + offset)}

    first, second = ([pixels(box) for box in group.tolist()] for group in boxes)
    expected = [[len(a & b) / len(a | b if mode == 'iou' else a) for b in second] for a in first]
    expected = torch.tensor(expected)
    result = bbox_overlaps(*boxes.float(), mode=mode, aligned=aligned, offset=offset)
    torch.testing.assert_close(result, expected.diagonal() if aligned else expected)


def test_bbox_overlaps_do_not_overflow_in_half_precision() -> None:
    boxes = torch.tensor([[0, 0, 1000, 800], [0, 0, 500, 800]], dtype=torch.float16)
    assert bbox_overlaps(boxes, boxes).tolist() == [[1, 0.5], [0.5, 1]]


def test_bbox_overlaps_accept_empty_input() -> None:
    assert bbox_overlaps(torch.zeros(0, 4), torch.zeros(3, 4)).shape == (0, 3)
