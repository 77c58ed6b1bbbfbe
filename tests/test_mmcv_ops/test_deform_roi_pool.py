import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from mmcv.ops import DeformRoIPoolPack, ModulatedDeformRoIPoolPack, deform_roi_pool, roi_align
from torch import Tensor

pytestmark = pytest.mark.usefixtures('each_device')

# Atomic additions on a GPU come in any order.
gradcheck = partial(torch.autograd.gradcheck, nondet_tol=1e-9)

SCALE, SIZE, GAMMA = 0.5, (3, 2), 0.3


def make_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Feature maps, RoIs and offsets."""
    rois = [[0, 2.3, 3.1, 17.6, 13.2], [1, -4.2, -3.3, 9.1, 22.7], [1, 5.2, 5.1, 14.3, 9.4]]
    offset = torch.randn(3, 2, *SIZE, dtype=torch.float64)
    return torch.rand(2, 2, 10, 12, dtype=torch.float64), torch.tensor(rois, dtype=torch.float64), offset


@pytest.mark.parametrize('ratio', [0, 2])
def test_bins_are_averages_at_their_moved_places(ratio: int, bilinear_with_border: Callable) -> None:
    maps, rois, offset = make_inputs()
    result = deform_roi_pool(maps, rois, offset, SIZE, SCALE, ratio, GAMMA)
    for k, roi in enumerate(rois):
        x1, y1, x2, y2 = (roi[1:] * SCALE - 0.5).tolist()
        bin_height, bin_width = (y2 - y1) / SIZE[0], (x2 - x1) / SIZE[1]
        rows, columns = ratio or math.ceil(bin_height), ratio or math.ceil(bin_width)
        for i in range(SIZE[0]):
            for j in range(SIZE[1]):
                dx, dy = offset[k, :, i, j].tolist()
                y = torch.arange(rows).add(0.5).div(rows).add(i).mul(bin_height) + y1 + GAMMA * dy * (y2 - y1)
                x = torch.arange(columns).add(0.5).div(columns).add(j).mul(bin_width) + x1 + GAMMA * dx * (x2 - x1)
                y, x = torch.meshgrid(y.double(), x.double(), indexing='ij')
                expected = bilinear_with_border(maps[int(roi[0])], y, x).mean(dim=(1, 2))
                torch.testing.assert_close(result[k, :, i, j], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('ratio', [0, 2])
def test_without_offsets_it_is_roi_align(ratio: int) -> None:
    maps, rois, _ = make_inputs()
    maps.requires_grad_()
    results = deform_roi_pool(maps, rois, None, SIZE, SCALE, ratio), roi_align(maps, rois, SIZE, SCALE, ratio)
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad((result**2).sum(), maps) for result in results))


@pytest.mark.parametrize('ratio', [0, 2])
def test_gradients(ratio: int) -> None:
    maps, rois, offset = make_inputs()
    inputs = maps.requires_grad_(), offset.requires_grad_()
    assert gradcheck(lambda x, o: deform_roi_pool(x, rois, o, SIZE, SCALE, ratio, GAMMA), inputs)


@pytest.mark.parametrize('pack', [DeformRoIPoolPack, ModulatedDeformRoIPoolPack])
def test_packs_train(pack: type[torch.nn.Module]) -> None:
    module = pack(SIZE, 2, deform_fc_channels=8, spatial_scale=SCALE, sampling_ratio=2)
    maps, rois, _ = make_inputs()
    module(maps.float(), rois.float()).sum().backward()
    assert module.offset_fc[-1].weight.grad.any()


def test_no_rois() -> None:
    maps, rois, offset = make_inputs()
    maps.requires_grad_()
    pooled = deform_roi_pool(maps, rois[:0], offset[:0], SIZE)
    pooled.sum().backward()
    assert pooled.shape == (0, 2, *SIZE)


def test_half_precision() -> None:
    maps, rois, offset = (tensor.half() for tensor in make_inputs())
    pooled = deform_roi_pool(maps, rois, offset, SIZE, SCALE, 2, GAMMA)
    expected = deform_roi_pool(maps.float(), rois.float(), offset.float(), SIZE, SCALE, 2, GAMMA)
    torch.testing.assert_close(pooled, expected.half())
