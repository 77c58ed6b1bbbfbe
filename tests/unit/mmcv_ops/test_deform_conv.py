from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import DeformConv2dPack, ModulatedDeformConv2dPack, SAConv2d, deform_conv2d, modulated_deform_conv2d
from torch import Tensor

from mmevm.mmcv_ops.ext import deform_conv_backward_parameters

pytestmark = pytest.mark.usefixtures('each_device')

# Atomic additions on a GPU have no fixed order.
gradcheck = partial(torch.autograd.gradcheck, nondet_tol=1e-9)

# stride, padding, dilation, groups, deform_groups
GEOMETRIES = [(1, 1, 1, 1, 1), (2, 1, 1, 2, 1), (1, 2, 2, 1, 2), ((2, 1), (0, 1), (1, 2), 2, 2)]


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def make_inputs(stride, padding, dilation, groups: int, deform_groups: int) -> tuple[Tensor, ...]:
    """Return feature map, offsets, mask, weight and bias."""
    maps = torch.rand(2, 4, 7, 6, dtype=torch.float64)
    weight = torch.rand(6, 4 // groups, 3, 2, dtype=torch.float64)
    height, width = F.conv2d(maps, weight, None, stride, padding, dilation, groups).shape[2:]
    offset = torch.randn(2, deform_groups * 2 * 6, height, width, dtype=torch.float64)
    mask = torch.rand(2, deform_groups * 6, height, width, dtype=torch.float64)
    return maps, offset, mask, weight, torch.rand(6, dtype=torch.float64)


def reference_deform_conv(
    maps: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, geometry: tuple, sample: Callable
) -> Tensor:
    stride, padding, dilation = (pair(value) for value in geometry[:3])
    groups, deform_groups = geometry[3:]
    channels = maps.shape[1]
    height, width = offset.shape[2:]
    windows = torch.zeros(2, channels, 6, height, width, dtype=maps.dtype)
    for image in range(2):
        for channel in range(channels):
            for tap in range(6):
                place = channel // (channels // deform_groups) * 6 + tap
                i, j = divmod(tap, 2)
                y = torch.arange(height)[:, None] * stride[0] - padding[0] + i * dilation[0]
                x = torch.arange(width) * stride[1] - padding[1] + j * dilation[1]
                dy, dx = offset[image, 2 * place], offset[image, 2 * place + 1]
                samples = sample(maps[image, channel, None], y + dy, x + dx)[0]
                windows[image, channel, tap] = samples * mask[image, place]
    windows = windows.reshape(2, groups, channels // groups, 6, height, width)
    weight = weight.reshape(groups, 6 // groups, channels // groups, 6)
    return torch.einsum('bgcthw,goct->bgohw', windows, weight).flatten(1, 2) + bias[:, None, None]


@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_deform_conv_equals_convolution_of_samples(geometry: tuple, bilinear: Callable) -> None:
    maps, offset, mask, weight, bias = make_inputs(*geometry)
    result = deform_conv2d(maps, offset, weight, *geometry)
    expected = reference_deform_conv(maps, offset, torch.ones_like(mask), weight, 0 * bias, geometry, bilinear)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize('with_bias', [True, False])
@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_modulated_deform_conv_equals_convolution_of_weighted_samples(
    geometry: tuple, with_bias: bool, bilinear: Callable
) -> None:
    maps, offset, mask, weight, bias = make_inputs(*geometry)
    result = modulated_deform_conv2d(maps, offset, mask, weight, bias if with_bias else None, *geometry)
    expected = reference_deform_conv(maps, offset, mask, weight, bias * with_bias, geometry, bilinear)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_gradients(geometry: tuple) -> None:
    maps, offset, mask, weight, bias = (tensor.requires_grad_() for tensor in make_inputs(*geometry))
    assert gradcheck(lambda *x: deform_conv2d(*x, *geometry), (maps, offset, weight), fast_mode=True)
    inputs = (maps, offset, mask, weight, bias)
    assert gradcheck(lambda *x: modulated_deform_conv2d(*x, *geometry), inputs, fast_mode=True)
    assert gradcheck(
        lambda *x: modulated_deform_conv2d(*x, None, *geometry), (maps, offset, mask, weight), fast_mode=True
    )


@pytest.mark.parametrize('modulated', [True, False])
@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_offset_gradient_at_integer_positions(geometry: tuple, modulated: bool, bilinear: Callable) -> None:
    """The derivative is one-sided there: the right one, except at -1, which mmcv treats as outside the image."""
    maps, offset, mask, weight, bias = make_inputs(*geometry)
    offset = offset.round().requires_grad_()
    if modulated:
        output = modulated_deform_conv2d(maps, offset, mask, weight, bias, *geometry)
    else:
        mask, bias = torch.ones_like(mask), 0 * bias
        output = deform_conv2d(maps, offset, weight, *geometry)
    grad_output = torch.rand_like(output)
    (grad,) = torch.autograd.grad(output, offset, grad_output)

    stride, padding, dilation = (pair(value) for value in geometry[:3])
    offset = offset.detach()
    step = 2**-10  # any step gives the exact derivative, because samples are linear between integers
    at_minus_one = 0
    for channel in range(offset.shape[1]):
        axis = channel % 2
        tap = divmod(channel // 2 % 6, 2)[axis]
        size = offset.shape[2 + axis]
        start = torch.arange(size) * stride[axis] - padding[axis] + tap * dilation[axis]
        position = offset[:, channel] + (start[:, None] if axis == 0 else start)
        at_minus_one += (position == -1).sum()
        moved = offset.clone()
        moved[:, channel] += step * (1 - 2 * (position == -1).double())
        difference = reference_deform_conv(maps, moved, mask, weight, bias, geometry, bilinear) - output.detach()
        expected = (difference * grad_output).sum(dim=1) / (moved - offset)[:, channel]
        torch.testing.assert_close(grad[:, channel], expected)
    assert at_minus_one


def test_initial_offset_gradient_equals_compiled_operator() -> None:
    """The offsets of a new layer are 0. Expected values: the test suite of mmcv, with compiled operators."""
    module = ModulatedDeformConv2dPack(1, 1, 2, padding=1, bias=False).double()
    module.weight.data.fill_(1)
    module(torch.arange(1, 4).double().expand(1, 1, 3, 3).contiguous()).sum().backward()
    expected = torch.tensor([-3, -1.5] * 4 + [4.5] * 4, dtype=torch.float64)
    torch.testing.assert_close(module.conv_offset.bias.grad, expected)


def test_larger_offsets_use_first_values_of_each_image() -> None:
    """DyHead passes such offsets between levels of equal size."""
    geometry = (2, 1, 1, 2, 2)
    maps, offset, mask, weight, bias = (tensor.requires_grad_() for tensor in make_inputs(*geometry))

    def enlarge(tensor: Tensor) -> Tensor:
        """Append random values to each image, for three times the rows and twice the columns."""
        batch, channels, height, width = tensor.shape
        rest = torch.rand(batch, 5 * channels * height * width, dtype=tensor.dtype)
        return torch.cat([tensor.flatten(1), rest], dim=1).reshape(batch, channels, 3 * height, 2 * width)

    results = [
        modulated_deform_conv2d(maps, resize(offset), resize(mask), weight, bias, *geometry)
        for resize in (lambda tensor: tensor, enlarge)
    ]
    torch.testing.assert_close(results[1], results[0])
    inputs = (maps, offset, mask, weight, bias)
    for grads in zip(*(torch.autograd.grad((result**2).sum(), inputs) for result in results), strict=True):
        torch.testing.assert_close(*grads)


def test_channels_last_inputs_give_same_result() -> None:
    inputs = [tensor.requires_grad_() for tensor in make_inputs(*GEOMETRIES[0])]
    results = [
        modulated_deform_conv2d(*tensors, *GEOMETRIES[0])
        for tensors in (inputs, [*(x.to(memory_format=torch.channels_last) for x in inputs[:4]), inputs[4]])
    ]
    torch.testing.assert_close(results[1], results[0])
    for grads in zip(*(torch.autograd.grad((result**2).sum(), inputs) for result in results), strict=True):
        torch.testing.assert_close(*grads)


def test_smaller_offsets_raise_error() -> None:
    maps, offset, mask, weight, bias = make_inputs(*GEOMETRIES[0])
    with pytest.raises(RuntimeError, match='offset output dims'):
        modulated_deform_conv2d(maps, offset[:, :, 1:], mask, weight, bias, *GEOMETRIES[0])


def test_gradient_of_weight_alone() -> None:
    maps, offset, _, weight, _ = make_inputs(*GEOMETRIES[0])
    weight.requires_grad_()
    assert gradcheck(lambda w: deform_conv2d(maps, offset, w, *GEOMETRIES[0]), (weight,), fast_mode=True)


@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_weight_gradient_is_accumulated_with_scale(geometry: tuple) -> None:
    """Call the operator directly, because mmcv calls it once and with scale 1."""
    maps, offset, _, weight, _ = make_inputs(*geometry)
    output = deform_conv2d(maps, offset, weight.requires_grad_(), *geometry)
    grad = torch.rand_like(output)
    (expected,) = torch.autograd.grad(output, weight, grad)
    (dH, dW), (padH, padW), (dilationH, dilationW) = (pair(value) for value in geometry[:3])
    total = torch.ones_like(expected)
    for scale in (1.0, 0.25):
        deform_conv_backward_parameters(
            maps,
            offset,
            grad,
            total,
            columns=maps.new_empty(0),
            ones=maps.new_empty(0),
            kW=2,
            kH=3,
            dW=dW,
            dH=dH,
            padW=padW,
            padH=padH,
            dilationW=dilationW,
            dilationH=dilationH,
            group=geometry[3],
            deformable_group=geometry[4],
            scale=scale,
            im2col_step=2,
        )
    torch.testing.assert_close(total, 1 + 1.25 * expected)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_mixed_precision(dtype: torch.dtype) -> None:
    """Under autocast, offsets have half precision and the other inputs single precision."""
    inputs = [tensor.float().requires_grad_() for tensor in make_inputs(*GEOMETRIES[0])]
    maps, offset, mask, weight, bias = inputs
    results = [
        modulated_deform_conv2d(maps, offset.to(kind), mask, weight, bias, *GEOMETRIES[0])
        for kind in (dtype, torch.float32)
    ]
    assert results[0].dtype == dtype
    # Offsets rounded to bfloat16 move the samples by up to 2⁻⁸ of their size.
    torch.testing.assert_close(results[0].float(), results[1], rtol=0.05, atol=0.1)
    for grads in zip(
        *(torch.autograd.grad(result.sum(), (maps, mask, weight, bias)) for result in results), strict=True
    ):
        torch.testing.assert_close(*grads, rtol=0.1, atol=0.5)
    half = deform_conv2d(maps, offset.to(dtype), weight, *GEOMETRIES[0])
    torch.testing.assert_close(half.float(), deform_conv2d(maps, offset, weight, *GEOMETRIES[0]), rtol=0.05, atol=0.1)


@pytest.mark.parametrize('layer', [DeformConv2dPack, ModulatedDeformConv2dPack])
def test_new_layer_equals_plain_convolution(layer: type[torch.nn.Module]) -> None:
    module = layer(4, 8, 3, padding=1)
    maps = torch.rand(2, 4, 9, 7)
    scale = 0.5 if layer is ModulatedDeformConv2dPack else 1  # the initial mask is sigmoid(0)
    bias = module.bias if layer is ModulatedDeformConv2dPack else None
    torch.testing.assert_close(module(maps), F.conv2d(maps, module.weight * scale, bias, padding=1))


def test_switchable_atrous_convolution_trains() -> None:
    module = SAConv2d(4, 8, 3, padding=1, use_deform=True)
    module(torch.rand(2, 4, 9, 7)).sum().backward()
    assert module.offset_s.weight.grad.any()
    assert module.weight.grad.any()


def test_nan_offsets_give_zero_samples() -> None:
    """A diverged model must report its loss instead of crashing."""
    maps, offset, mask, weight, bias = make_inputs(*GEOMETRIES[0])
    offset[0] = torch.nan
    inputs = [tensor.requires_grad_() for tensor in (maps, offset, mask, weight, bias)]
    result = modulated_deform_conv2d(*inputs, *GEOMETRIES[0])
    result.sum().backward()
    torch.testing.assert_close(result[0], bias[:, None, None].expand_as(result[0]))
    assert result[1].isfinite().all()
    plain = deform_conv2d(maps, offset, weight, *GEOMETRIES[0])
    plain.sum().backward()
    assert not plain[0].any()
