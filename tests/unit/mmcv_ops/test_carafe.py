from functools import partial

import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import CARAFEPack, carafe, carafe_naive
from torch import Tensor

from mmevm.mmcv_ops.ext import carafe_naive_backward

pytestmark = pytest.mark.usefixtures('each_device')

# Atomic additions on a GPU have no fixed order.
gradcheck = partial(torch.autograd.gradcheck, nondet_tol=1e-9)

# kernel, groups, scale
SETTINGS = [(3, 1, 2), (5, 2, 2), (1, 4, 3), (3, 2, 1)]


def make_inputs(kernel: int, groups: int, scale: int) -> tuple[Tensor, Tensor]:
    features = torch.rand(2, 4, 5, 6, dtype=torch.float64)
    return features, torch.rand(2, groups * kernel**2, 5 * scale, 6 * scale, dtype=torch.float64)


def reference_carafe(features: Tensor, masks: Tensor, kernel: int, groups: int, scale: int) -> Tensor:
    windows = F.unfold(features, kernel, padding=kernel // 2).reshape(2, groups, 4 // groups, kernel**2, 5, 6)
    windows = windows.repeat_interleave(scale, dim=4).repeat_interleave(scale, dim=5)
    return (windows * masks.unflatten(1, (groups, 1, kernel**2))).sum(dim=3).flatten(1, 2)


@pytest.mark.parametrize('function', [carafe, carafe_naive])
@pytest.mark.parametrize('settings', SETTINGS)
def test_carafe_equals_weighted_sums_of_windows(function, settings: tuple[int, int, int]) -> None:
    features, masks = make_inputs(*settings)
    torch.testing.assert_close(function(features, masks, *settings), reference_carafe(features, masks, *settings))


@pytest.mark.parametrize('settings', SETTINGS)
def test_carafe_gradients(settings: tuple[int, int, int]) -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs(*settings)]
    assert gradcheck(lambda *x: carafe(*x, *settings), inputs, fast_mode=True)


@pytest.mark.parametrize('settings', SETTINGS)
def test_carafe_naive_gradients(settings: tuple[int, int, int]) -> None:
    """Call the operator directly, because mmcv supports the backward pass of carafe_naive on a GPU only."""
    inputs = [tensor.requires_grad_() for tensor in make_inputs(*settings)]
    output = reference_carafe(*inputs, *settings)
    grad = torch.rand_like(output)
    results = [torch.zeros_like(tensor) for tensor in inputs]
    with torch.no_grad():
        carafe_naive_backward(
            grad, *inputs, *results, kernel_size=settings[0], group_size=settings[1], scale_factor=settings[2]
        )
    torch.testing.assert_close(tuple(results), torch.autograd.grad(output, inputs, grad))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_carafe_in_half_precision(dtype: torch.dtype) -> None:
    features, masks = (tensor.to(dtype).requires_grad_() for tensor in make_inputs(5, 2, 2))
    result, expected = carafe(features, masks, 5, 2, 2), carafe(features.float(), masks.float(), 5, 2, 2)
    torch.testing.assert_close(result, expected.to(dtype))
    for half, single in zip(
        *(torch.autograd.grad(x.sum(), (features, masks)) for x in (result, expected)), strict=True
    ):
        torch.testing.assert_close(half, single)


def test_carafe_pack_upsamples_and_trains() -> None:
    module = CARAFEPack(8, 2, compressed_channels=4)
    result = module(torch.rand(1, 8, 4, 6))
    assert result.shape == (1, 8, 8, 12)
    (result**2).sum().backward()
    assert module.content_encoder.weight.grad.any()
