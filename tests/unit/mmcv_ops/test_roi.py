import math
from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
from mmcv.ops import RoIAlign, RoIPool, roi_align, roi_pool
from torch import Tensor

from mmevm.mmcv_ops import grids
from mmevm.mmcv_ops import roi as roi_operators
from mmevm.mmcv_ops.ext import roi_pool_forward

pytestmark = pytest.mark.usefixtures('each_device')

# Atomic additions on a GPU have no fixed order.
gradcheck = partial(torch.autograd.gradcheck, nondet_tol=1e-9)

SCALE = 0.5


def make_rois() -> Tensor:
    rois = [
        [0, 2.3, 3.1, 17.6, 13.2],
        [1, -4.2, -3.3, 9.1, 30.7],  # across the border
        [0, 60.0, 60.0, 70.0, 72.0],  # outside
        [1, 5.2, 5.1, 5.9, 21.4],  # thin
        [0, 1.2, 0.7, 27.8, 19.9],
        [1, 20.4, 1.3, 26.9, 14.8],  # far from the diagonal
    ]
    return torch.tensor(rois, dtype=torch.float64)


def features() -> Tensor:
    return torch.rand(2, 2, 10, 14, dtype=torch.float64)


def reference_roi_align(
    image: Tensor, roi: Tensor, size: tuple[int, int], ratio: int, mode: str, aligned: bool, sample: Callable
) -> Tensor:
    shift = 0.5 if aligned else 0
    x1, y1, x2, y2 = (roi * SCALE - shift).tolist()
    height, width = y2 - y1, x2 - x1
    if not aligned:
        height, width = max(height, 1), max(width, 1)
    bin_height, bin_width = height / size[0], width / size[1]
    rows, columns = ratio or math.ceil(bin_height), ratio or math.ceil(bin_width)
    result = torch.empty(len(image), *size, dtype=image.dtype)
    for i in range(size[0]):
        for j in range(size[1]):
            y = y1 + (i + (torch.arange(rows, dtype=torch.float64) + 0.5) / rows) * bin_height
            x = x1 + (j + (torch.arange(columns, dtype=torch.float64) + 0.5) / columns) * bin_width
            samples = sample(image, y[:, None].expand(rows, columns), x.expand(rows, columns)).flatten(1)
            result[:, i, j] = samples.mean(dim=1) if mode == 'avg' else samples.amax(dim=1)
    return result


@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('ratio', [0, 1, 3])
@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align_equals_average_or_maximum_of_samples(
    mode: str, ratio: int, aligned: bool, bilinear_with_border: Callable
) -> None:
    maps, rois = features(), make_rois()
    result = RoIAlign((3, 2), SCALE, ratio, mode, aligned)(maps, rois)
    for roi, pooled in zip(rois, result, strict=True):
        image = maps[int(roi[0])]
        expected = reference_roi_align(image, roi[1:], (3, 2), ratio, mode, aligned, bilinear_with_border)
        torch.testing.assert_close(pooled, expected)


@pytest.mark.parametrize('size', [(3, 2), (1, 1)])
@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align_of_a_point(mode: str, size: tuple[int, int], bilinear_with_border: Callable) -> None:
    """With aligned=False the RoI has a size of one pixel; with aligned=True it has no samples."""
    maps, roi = features(), torch.tensor([[0, 5.0, 7, 5, 7]], dtype=torch.float64)
    expected = reference_roi_align(maps[0], roi[0, 1:], size, 0, mode, False, bilinear_with_border)
    torch.testing.assert_close(roi_align(maps, roi, size, SCALE, 0, mode, False)[0], expected)
    pooled = roi_align(maps.requires_grad_(), roi, size, SCALE, 0, mode, True)
    pooled.sum().backward()
    assert not pooled.any()
    assert not maps.grad.any()


@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('ratio', [0, 2])
@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align_gradient(mode: str, ratio: int, aligned: bool) -> None:
    maps, rois = features().requires_grad_(), make_rois()
    assert gradcheck(lambda x: roi_align(x, rois, (3, 2), SCALE, ratio, mode, aligned), (maps,), fast_mode=True)


def test_roi_align_does_not_depend_on_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    maps, rois = features().requires_grad_(), make_rois()[[0, 1, 4, 0, 1, 4]]
    results = []
    for limit in (grids.MAX_SAMPLES, 1):
        monkeypatch.setattr(grids, 'MAX_SAMPLES', limit)
        pooled = roi_align(maps, rois, (3, 2), SCALE, 0, 'max', True)
        results.append((pooled, *torch.autograd.grad((pooled**2).sum(), maps)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align_does_not_depend_on_threads(
    mode: str, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = mock.Mock(wraps=roi_operators.ThreadPoolExecutor)
    monkeypatch.setattr(roi_operators, 'ThreadPoolExecutor', pool)
    maps, rois = torch.rand(2, 5, 10, 14).to(memory_format=memory_format).requires_grad_(), make_rois().float()
    threads, results, used = torch.get_num_threads(), [], []
    try:
        for number, elements in ((1, 1), (2, 1), (4, 1), (2, 1000)):
            torch.set_num_threads(number)
            monkeypatch.setattr(roi_operators, '_MIN_ELEMENTS', elements)
            pool.reset_mock()
            pooled = roi_align(maps, rois, (3, 2), SCALE, 0, mode, True)
            results.append((pooled, *torch.autograd.grad((pooled**2).sum(), maps)))
            used.append(max((call.args[0] for call in pool.call_args_list), default=1))
            with torch.inference_mode():
                assert torch.equal(roi_align(maps, rois, (3, 2), SCALE, 0, mode, True), pooled)
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)
    assert used == ([1, 2, 4, 1] if maps.device.type == 'cpu' else [1, 1, 1, 1])


def test_gradients_of_many_grids_are_summed_in_single_precision() -> None:
    """400 RoIs of different sizes send a gradient of 1 to the same pixel. In bfloat16 the sum would stop at 256."""
    maps = torch.zeros(1, 1, 20, 20, dtype=torch.bfloat16)
    maps[..., 0, 0] = 1
    sizes = torch.cartesian_prod(torch.arange(1, 21), torch.arange(1, 21))
    rois = torch.cat([torch.zeros(400, 3), sizes], dim=1).to(maps.dtype)
    roi_align(maps.requires_grad_(), rois, 1, 1.0, 0, 'max', True).sum().backward()
    assert maps.grad[0, 0, 0, 0] == 400
    assert maps.grad.sum() == 400


def reference_roi_pool(image: Tensor, roi: Tensor, size: tuple[int, int]) -> Tensor:
    x1, y1, x2, y2 = roi.tolist()
    x1, y1, x2, y2 = x1 * SCALE, y1 * SCALE, (x2 + 1) * SCALE, (y2 + 1) * SCALE
    result = torch.zeros(len(image), *size, dtype=image.dtype)
    for i in range(size[0]):
        for j in range(size[1]):
            pixels = [
                image[:, y, x]
                for y in range(image.shape[1])
                for x in range(image.shape[2])
                if math.floor(y1 + i * (y2 - y1) / size[0]) <= y < math.ceil(y1 + (i + 1) * (y2 - y1) / size[0])
                and math.floor(x1 + j * (x2 - x1) / size[1]) <= x < math.ceil(x1 + (j + 1) * (x2 - x1) / size[1])
            ]
            if pixels:
                result[:, i, j] = torch.stack(pixels).amax(dim=0)
    return result


def test_roi_pool_equals_maximum_of_pixels() -> None:
    maps, rois = features() - 0.5, make_rois()
    result = RoIPool((3, 4), SCALE)(maps, rois)
    for roi, pooled in zip(rois, result, strict=True):
        torch.testing.assert_close(pooled, reference_roi_pool(maps[int(roi[0])], roi[1:], (3, 4)))


def test_roi_pool_gradient() -> None:
    # Integers, so that the step of the numeric derivative changes no maximum.
    maps = torch.randperm(2 * 2 * 10 * 14).double().reshape(2, 2, 10, 14).requires_grad_()
    assert gradcheck(lambda x: roi_pool(x, make_rois(), (3, 4), SCALE), (maps,), fast_mode=True)


def test_roi_pool_argmax_is_minus_one_for_bins_without_pixels() -> None:
    """The backward pass treats any other index as a pixel."""
    maps = features()
    outside = torch.tensor([[0, 60.0, 60, 70, 72], [0, 9.6, 4, 8.4, 7]], dtype=torch.float64)
    output, argmax = maps.new_zeros(2, 2, 3, 4), torch.zeros(2, 2, 3, 4, dtype=torch.int)
    roi_pool_forward(maps, outside, output, argmax, pooled_height=3, pooled_width=4, spatial_scale=1.0)
    assert (argmax == -1).all()


@pytest.mark.parametrize('roi', [[0, 9.6, 4, 8.4, 7], [0, 9.5, 4, 8.5, 7], [0, 4, 7.5, 9, 6.5]])
def test_roi_pool_of_inverted_or_empty_roi_is_zero(roi: list[float]) -> None:
    maps = features().requires_grad_()
    pooled = roi_pool(maps, torch.tensor([roi], dtype=torch.float64), (2, 2), 1.0)
    pooled.sum().backward()
    assert not pooled.any()
    assert not maps.grad.any()


@pytest.mark.parametrize('pool', [RoIAlign(2), RoIAlign(2, pool_mode='max'), RoIPool(2)], ids=['avg', 'max', 'pool'])
def test_empty_rois(pool: torch.nn.Module) -> None:
    maps = features().requires_grad_()
    pooled = pool(maps, make_rois()[:0])
    pooled.sum().backward()
    assert pooled.shape == (0, 2, 2, 2)
    assert not maps.grad.any()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('pool', [RoIAlign(2), RoIAlign(2, pool_mode='max'), RoIPool(2)], ids=['avg', 'max', 'pool'])
def test_half_precision(pool: torch.nn.Module, dtype: torch.dtype) -> None:
    maps, rois = features().to(dtype).requires_grad_(), make_rois().to(dtype)
    pooled = pool(maps, rois)
    expected = pool(maps.float(), rois.float())
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled, expected.to(dtype))
    (grad,) = torch.autograd.grad(pooled.sum(), maps)
    (expected_grad,) = torch.autograd.grad(expected.sum(), maps)
    torch.testing.assert_close(grad, expected_grad)
