from collections.abc import Callable
from functools import partial

import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch
from torch import Tensor

pytestmark = pytest.mark.usefixtures('each_device')

# Atomic additions on a GPU have no fixed order.
gradcheck = partial(torch.autograd.gradcheck, nondet_tol=1e-9)

SHAPES = torch.tensor([[6, 5], [3, 4], [1, 2]])
STARTS = torch.tensor([0, 30, 42])
BATCH, HEADS, CHANNELS, QUERIES, POINTS = 2, 2, 3, 5, 4


def make_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Return values, locations (some of them outside the image) and weights."""
    value = torch.rand(BATCH, 44, HEADS, CHANNELS, dtype=torch.float64)
    locations = torch.rand(BATCH, QUERIES, HEADS, 3, POINTS, 2, dtype=torch.float64) * 1.4 - 0.2
    weights = torch.rand(BATCH, QUERIES, HEADS, 3, POINTS, dtype=torch.float64)
    return value, locations, weights


def attend(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Call the function that mmcv uses on a GPU."""
    return MultiScaleDeformableAttnFunction.apply(
        value, SHAPES.to(value.device), STARTS.to(value.device), locations, weights, 64
    )


def test_attention_equals_weighted_sums_of_samples(bilinear: Callable) -> None:
    value, locations, weights = make_inputs()
    expected = torch.zeros(BATCH, QUERIES, HEADS, CHANNELS, dtype=torch.float64)
    for image in range(BATCH):
        for head in range(HEADS):
            for level, (height, width) in enumerate(SHAPES.tolist()):
                keys = slice(STARTS[level], STARTS[level] + height * width)
                level_map = value[image, keys, head].T.reshape(CHANNELS, height, width)
                x, y = locations[image, :, head, level].unbind(dim=-1)
                samples = bilinear(level_map, y * height - 0.5, x * width - 0.5)
                expected[image, :, head] += (samples * weights[image, :, head, level]).sum(dim=2).T
    torch.testing.assert_close(attend(value, locations, weights), expected.flatten(2))


def test_attention_equals_the_cpu_implementation_of_mmcv() -> None:
    value, locations, weights = inputs = [tensor.requires_grad_() for tensor in make_inputs()]
    results = attend(*inputs), multi_scale_deformable_attn_pytorch(value, SHAPES, locations, weights)
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad((result**2).sum(), inputs) for result in results))


def test_attention_gradients() -> None:
    assert gradcheck(attend, [tensor.requires_grad_() for tensor in make_inputs()], fast_mode=True)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_attention_with_values_in_half_precision(dtype: torch.dtype) -> None:
    value, locations, weights = (tensor.float() for tensor in make_inputs())
    value = value.to(dtype).requires_grad_()
    result = attend(value, locations, weights)
    assert result.dtype == dtype
    # mmcv also casts locations and weights to the dtype of the values.
    expected = attend(value.float(), locations.to(dtype).float(), weights.to(dtype).float())
    torch.testing.assert_close(result, expected.to(dtype))
    assert torch.autograd.grad(result.sum(), value)[0].dtype == dtype
