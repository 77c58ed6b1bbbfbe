import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from mmcv.ops import DeformRoIPoolPack, ModulatedDeformRoIPoolPack, deform_roi_pool, roi_align
from torch import Tensor

pytestmark = pytest.mark.usefixtures('each_device')

# Atomic additions on a GPU have no fixed order.
gradcheck = partial(torch.autograd.gradcheck, nondet_tol=1e-9)

SCALE, SIZE, GAMMA = 0.5, (3, 2), 0.3


def make_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Return feature maps, RoIs and offsets."""
    rois = [[0, 2.3, 3.1, 17.6, 13.2], [1, -4.2, -3.3, 9.1, 22.7], [1, 5.2, 5.1, 14.3, 9.4]]
    offset = torch.randn(3, 2, *SIZE, dtype=torch.float64)
    return torch.rand(2, 2, 10, 12, dtype=torch.float64), torch.tensor(rois, dtype=torch.float64), offset


@pytest.mark.parametrize('ratio', [0, 2])
def test_bins_equal_averages_at_shifted_positions(ratio: int, bilinear_with_border: Callable) -> None:
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
def test_without_offsets_equals_roi_align(ratio: int) -> None:
    maps, rois, _ = make_inputs()
    maps.requires_grad_()
    results = deform_roi_pool(maps, rois, None, SIZE, SCALE, ratio), roi_align(maps, rois, SIZE, SCALE, ratio)
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad((result**2).sum(), maps)[0] for result in results]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


@pytest.mark.parametrize('shape', [(1, 1), (1, 2), (2, 1), (3, 2)])
def test_equals_roi_align_on_tiny_feature_maps(shape: tuple[int, int]) -> None:
    maps = torch.rand(2, 2, *shape, dtype=torch.float64)
    rois = torch.tensor([[0, -1.3, -0.9, 2.1, 1.7], [1, 0.2, 0.1, 1.9, 2.4]], dtype=torch.float64)
    torch.testing.assert_close(deform_roi_pool(maps, rois, None, SIZE, 1.0, 2), roi_align(maps, rois, SIZE, 1.0, 2))


@pytest.mark.parametrize(('y', 'x'), [(-1, 4), (10, 4), (3, -1), (3, 12)])
def test_samples_repeat_border_for_one_pixel_then_are_zero(y: int, x: int) -> None:
    maps, _, _ = make_inputs()  # 10 × 12 pixels
    outward = torch.tensor([(x == 12) - (x == -1), (y == 10) - (y == -1)])
    center = torch.stack([torch.tensor([x, y]), torch.tensor([x, y]) + 0.25 * outward]) + 0.5
    rois = torch.cat([torch.zeros(2, 1), center - 2, center + 2], dim=1).double()
    at_border, beyond = deform_roi_pool(maps, rois, None, 1, 1.0, 1).flatten(1)
    torch.testing.assert_close(at_border, maps[0, :, min(max(y, 0), 9), min(max(x, 0), 11)])
    assert not beyond.any()


def test_rois_are_pooled_from_their_image() -> None:
    maps, rois, offset = make_inputs()
    rois = rois[[0, 0, 0, 0]]
    rois[:, 0] = torch.tensor([1, 0, 0, 1])
    inputs = maps.requires_grad_(), offset[[0, 1, 2, 0]].requires_grad_()
    batched = deform_roi_pool(inputs[0], rois, inputs[1], SIZE, SCALE, 2, GAMMA)
    separate = torch.cat(
        [
            deform_roi_pool(
                maps[[image]], torch.cat([rois.new_zeros(1), roi])[None], shift[None], SIZE, SCALE, 2, GAMMA
            )
            for (image, *_), roi, shift in zip(rois.int().tolist(), rois[:, 1:], inputs[1], strict=True)
        ]
    )
    torch.testing.assert_close(batched, separate)
    grads = [torch.autograd.grad((result**2).sum(), inputs) for result in (batched, separate)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize('ratio', [0, 2])
def test_gradients(ratio: int) -> None:
    maps, rois, offset = make_inputs()
    inputs = maps.requires_grad_(), offset.requires_grad_()
    assert gradcheck(lambda x, o: deform_roi_pool(x, rois, o, SIZE, SCALE, ratio, GAMMA), inputs, fast_mode=True)


@pytest.mark.parametrize('pack', [DeformRoIPoolPack, ModulatedDeformRoIPoolPack])
def test_pack_modules_train(pack: type[torch.nn.Module]) -> None:
    module = pack(SIZE, 2, deform_fc_channels=8, spatial_scale=SCALE, sampling_ratio=2)
    maps, rois, _ = make_inputs()
    module(maps.float(), rois.float()).sum().backward()
    assert module.offset_fc[-1].weight.grad.any()


def test_empty_rois() -> None:
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


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_gradients_in_half_precision(dtype: torch.dtype) -> None:
    maps, rois, offset = (tensor.to(dtype) for tensor in make_inputs())
    inputs = maps.requires_grad_(), offset.requires_grad_()
    pooled = deform_roi_pool(maps, rois, offset, SIZE, SCALE, 2, GAMMA)
    expected = deform_roi_pool(maps.float(), rois.float(), offset.float(), SIZE, SCALE, 2, GAMMA)
    grads, expected_grads = (torch.autograd.grad(result.sum(), inputs) for result in (pooled, expected))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, expected_grad)


def test_rois_without_area_give_zero() -> None:
    maps, _, offset = make_inputs()
    inputs = maps.requires_grad_(), offset.requires_grad_()
    points = torch.tensor([[0, 5.0, 7, 5, 7], [1, 3, 4, 9, 4], [1, 8, 2, 8, 9]], dtype=torch.float64)
    pooled = deform_roi_pool(maps, points, offset, SIZE, SCALE, 0, GAMMA)
    assert not pooled.any()
    assert not any(grad.any() for grad in torch.autograd.grad(pooled.sum(), inputs))


def test_half_precision_rois_are_not_rounded_again() -> None:
    """The RoI is 1024.5 pixels high and needs 513 samples per bin. In half precision its height rounds to 1024."""
    maps = torch.rand(1, 2, 1100, 3).requires_grad_()
    roi = torch.tensor([[0, 0.5, 0.5, 2, 1025]], dtype=torch.float16)
    results = [deform_roi_pool(maps, kind, None, (2, 1)) for kind in (roi, roi.float())]
    torch.testing.assert_close(*results, rtol=0, atol=0)
    grads = [torch.autograd.grad((result**2).sum(), maps)[0] for result in results]
    torch.testing.assert_close(*grads, rtol=0, atol=0)
