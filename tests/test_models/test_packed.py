"""A packed convolution is nn.Conv2d, whatever is done with it."""

import copy
import io
import platform

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmevm.models.packed import PackedConv2d

GEOMETRIES = [
    dict(in_channels=24, out_channels=40, kernel_size=1),
    dict(in_channels=24, out_channels=24, kernel_size=3, padding=1, groups=24),
    dict(in_channels=24, out_channels=24, kernel_size=3, stride=2, padding=1, groups=24, bias=False),
    dict(in_channels=3, out_channels=28, kernel_size=3, stride=2, padding=1),
    dict(in_channels=640, out_channels=24, kernel_size=1),
]
packs = pytest.mark.skipif(
    platform.machine() not in ('x86_64', 'AMD64') or not torch.backends.mkldnn.is_available(),
    reason='this processor keeps the plain convolution',
)


def make(**geometry):
    return PackedConv2d(**(geometry or GEOMETRIES[0])).eval().requires_grad_(False)


def plain_like(conv, geometry):
    plain = nn.Conv2d(**geometry).eval().requires_grad_(False)
    plain.load_state_dict(conv.state_dict())
    return plain


def images(*shape, **settings):
    return torch.randn(*shape, **settings).contiguous(memory_format=torch.channels_last)


def expected(conv, x):
    bias = None if conv.bias is None else conv.bias.double()
    return F.conv2d(x.double(), conv.weight.double(), bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def assert_right(conv, x):
    """The second time the weights are packed, if they can be."""
    for _ in range(2):
        out = conv(x)
        torch.testing.assert_close(out, expected(conv, x).to(out), rtol=1e-4, atol=1e-5)


@packs
@pytest.mark.parametrize('geometry', GEOMETRIES, ids=str)
def test_sizes_and_layouts_may_change_from_call_to_call(geometry):
    conv = make(**geometry)
    channels = geometry['in_channels']
    plain = plain_like(conv, geometry)
    for batch, height, width in [(16, 32, 32), (17, 7, 13), (18, 64, 5), (1, 70, 30), (2, 1, 1), (1, 2, 2)]:
        for x in (
            images(batch, channels, height, width),
            torch.randn(batch, channels, height, width),
            torch.randn(width, height, channels, batch).permute(3, 2, 1, 0),
        ):
            assert_right(conv, x)
            assert conv(x).stride() == plain(x).stride()
        assert conv._packed[2] == (batch, channels, height, width) or batch < 16


@packs
@pytest.mark.parametrize('geometry', GEOMETRIES, ids=str)
def test_a_shape_is_packed_for_when_it_comes_again(geometry):
    """Bit for bit as without: which kernel runs is for the shape to say, not for what was before."""
    conv = make(**geometry)
    plain = plain_like(conv, geometry)
    small, large = (images(batch, geometry['in_channels'], 40, 40) for batch in (16, 20))
    shapes = []
    for x in (small, large, small, large, large, small, large, small, small, large):
        assert torch.equal(conv(x), plain(x))
        shapes.append(conv._packed and conv._packed[2][0])
    assert shapes == [None] * 4 + [20] * 4 + [16] * 2


@pytest.mark.parametrize('geometry', GEOMETRIES, ids=str)
def test_numbers_do_not_depend_on_what_was_before(geometry):
    """PyTorch has other kernels for small images and for one thread, and other ones for maps of one pixel."""
    for shape in [(1, 4, 4), (1, 9, 9), (1, 100, 100), (2, 1, 1), (3, 2, 1), (16, 1, 1), (16, 5, 5), (0, 5, 5)]:
        conv = make(**geometry)
        plain = plain_like(conv, geometry)
        x = torch.randn(shape[0], *shape[1:], geometry['in_channels']).permute(0, 3, 1, 2)
        for _ in range(3):
            assert torch.equal(conv(x), plain(x)), shape


@pytest.mark.parametrize('geometry', GEOMETRIES, ids=str)
def test_no_image_and_an_image_without_a_batch(geometry):
    shape = geometry['in_channels'], 8, 8
    out = make(**geometry)(torch.zeros(0, *shape))
    assert (len(out), out.shape[1]) == (0, geometry['out_channels'])
    conv, x = make(**geometry), torch.randn(shape)
    assert_right(conv, x)


def new_values(conv):
    conv.weight.mul_(2)


def new_tensor(conv):
    conv.weight.data = torch.randn_like(conv.weight)


def new_parameter(conv):
    conv.weight = nn.Parameter(torch.randn_like(conv.weight), requires_grad=False)


def new_state(conv):
    conv.load_state_dict(make().state_dict())


def there_and_back(conv):
    conv.double().float()


@packs
@pytest.mark.parametrize('change', [new_values, new_tensor, new_parameter, new_state, there_and_back])
def test_weights_may_change(change):
    conv, x = make(), images(16, 24, 9, 9)
    assert_right(conv, x)
    before = conv._packed
    change(conv)
    assert_right(conv, x)
    assert conv._packed is not before


def test_copies_and_files_hold_the_weight_once():
    conv, x = make(), images(16, 24, 9, 9)
    assert_right(conv, x)
    out = conv(x)
    file = io.BytesIO()
    torch.save(conv, file)
    file.seek(0)
    for other in (copy.deepcopy(conv), torch.load(file, weights_only=False)):
        assert other._packed is None
        for _ in range(2):
            assert torch.equal(other(x), out)
    assert list(conv.state_dict()) == ['weight', 'bias']
    assert len(file.getvalue()) < 1.5 * 4 * conv.weight.numel() + 3000


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    conv, x = make().to(dtype), images(16, 24, 9, 9, dtype=dtype)
    assert conv(x).dtype == conv(x).dtype == dtype
    assert conv._packed is None
    torch.testing.assert_close(conv(x).double(), expected(conv, x), rtol=2e-2, atol=2e-2)


def test_autocast_and_gradients():
    conv, x = make(), images(16, 24, 9, 9)
    assert_right(conv, x)
    with torch.autocast('cpu', torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16
    x.requires_grad_()
    (grad,) = torch.autograd.grad(conv(x).sum(), x)
    (reference,) = torch.autograd.grad(expected(conv, x).sum(), x)
    torch.testing.assert_close(grad, reference)
    assert conv.requires_grad_()(x.detach()).requires_grad
    with torch.no_grad():
        assert_right(conv, x)


def test_inference_mode_and_switched_off_kernels():
    x = images(16, 24, 9, 9)
    with torch.inference_mode():
        conv = make()
        assert_right(conv, x)
    assert_right(conv, x)
    with torch.backends.mkldnn.flags(enabled=False):
        conv = make()
        assert_right(conv, x)
        assert conv._packed is None


def test_who_traces_sees_a_convolution():
    conv, x = make(), images(16, 24, 9, 9)
    assert_right(conv, x)
    out = conv(x)
    traced = torch.jit.trace(conv, x)
    assert 'aten::_convolution' in str(traced.inlined_graph)
    exported = torch.export.export(conv, (x,))
    assert 'torch.ops.aten.conv' in exported.graph_module.code  # conv2d or, before torch 2.5, convolution
    symbolic = torch.fx.symbolic_trace(conv)
    assert 'conv2d' in symbolic.code
    for graph in (str(traced.inlined_graph), exported.graph_module.code, symbolic.code):
        assert 'mkldnn' not in graph
    torch.testing.assert_close(traced(x), out)
    torch.testing.assert_close(exported.module()(x), out)
