"""PackedConv2d behaves as nn.Conv2d in every respect."""

import copy
import importlib.util
import io
import platform

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.model import ExponentialMovingAverage
from torch import nn
from torch.autograd import forward_ad
from versions import VERSION

from mmevm.models import packed_conv as packed
from mmevm.models.packed_conv import PackedConv2d

GEOMETRIES = [
    dict(in_channels=24, out_channels=40, kernel_size=1),
    dict(in_channels=24, out_channels=24, kernel_size=3, padding=1, groups=24),
    dict(in_channels=24, out_channels=24, kernel_size=3, stride=2, padding=1, groups=24, bias=False),
    dict(in_channels=3, out_channels=28, kernel_size=3, stride=2, padding=1),
    dict(in_channels=640, out_channels=24, kernel_size=1),
]
packs = pytest.mark.skipif(
    platform.machine() not in ('x86_64', 'AMD64') or not torch.backends.mkldnn.is_available() or VERSION < '2.8',
    reason='this processor or version of torch keeps the plain convolution',
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
    """Compare twice: the second call uses packed weights, if they can be packed."""
    for _ in range(2):
        out = conv(x)
        torch.testing.assert_close(out, expected(conv, x).to(out), rtol=1e-4, atol=1e-5)


@packs
@pytest.mark.parametrize('geometry', GEOMETRIES, ids=str)
def test_changing_sizes_and_layouts(geometry):
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
def test_weight_is_packed_at_the_second_input_of_a_shape(geometry):
    """The kernel depends on the shape, not on earlier calls, so the outputs are equal bit for bit."""
    conv = make(**geometry)
    plain = plain_like(conv, geometry)
    small, large = (images(batch, geometry['in_channels'], 40, 40) for batch in (16, 20))
    shapes = []
    for x in (small, large, small, large, large, small, large, small, small, large):
        assert torch.equal(conv(x), plain(x))
        shapes.append(conv._packed and conv._packed[2][0])
    assert shapes == [None] * 4 + [20] * 4 + [16] * 2


@pytest.mark.parametrize('geometry', GEOMETRIES, ids=str)
def test_outputs_do_not_depend_on_earlier_calls(geometry):
    """PyTorch uses other kernels for small images, for one thread and for maps of one pixel."""
    for shape in [(1, 4, 4), (1, 9, 9), (1, 100, 100), (2, 1, 1), (3, 2, 1), (16, 1, 1), (16, 5, 5), (0, 5, 5)]:
        conv = make(**geometry)
        plain = plain_like(conv, geometry)
        x = torch.randn(shape[0], *shape[1:], geometry['in_channels']).permute(0, 3, 1, 2)
        for _ in range(3):
            assert torch.equal(conv(x), plain(x)), shape


@pytest.mark.parametrize('geometry', GEOMETRIES, ids=str)
def test_empty_batch_and_unbatched_image(geometry):
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


def data(conv):
    conv.weight.data.mul_(2)


def data_of_a_listed_parameter(conv):
    next(conv.parameters()).data.mul_(2)


def in_inference_mode(conv):
    with torch.inference_mode():
        conv.weight.mul_(2)


def numpy_array(conv):
    conv.weight.numpy()[:] *= 2


def numpy_array_by_protocol(conv):
    np.asarray(conv.weight)[:] *= 2


def numpy_array_of_a_detached_tensor(conv):
    conv.weight.detach().numpy()[:] *= 2


def dlpack(conv):
    np.from_dlpack(torch.from_dlpack(conv.weight)).sum()
    torch.from_dlpack(conv.weight).mul_(2)


def storage(conv):
    torch.empty(0).set_(conv.weight.untyped_storage()).fill_(0.5)


def state_dict_tensor(conv):
    conv.state_dict()['weight'].data.mul_(2)


def state_dict_array(conv):
    conv.state_dict()['weight'].numpy()[:] *= 2


def averaged_weights(conv):
    """mmengine's EMAHook exchanges weights in validation."""
    average = ExponentialMovingAverage(make())
    for mine, averaged in zip(conv.parameters(), average.module.parameters(), strict=True):
        kept = averaged.data.clone()
        averaged.data.copy_(mine.data)
        mine.data.copy_(kept)


def vector(conv):
    vector = nn.utils.parameters_to_vector(conv.parameters())
    nn.utils.vector_to_parameters(2 * vector, conv.parameters())


def compiled_write(conv):
    torch.compile(lambda weight: weight.data.mul_(2), backend='eager')(conv.weight)


CHANGES = [
    new_values,
    new_tensor,
    new_parameter,
    new_state,
    there_and_back,
    data,
    data_of_a_listed_parameter,
    in_inference_mode,
    numpy_array,
    numpy_array_by_protocol,
    numpy_array_of_a_detached_tensor,
    dlpack,
    storage,
    state_dict_tensor,
    state_dict_array,
    averaged_weights,
    vector,
    compiled_write,
]


@packs
@pytest.mark.parametrize('change', CHANGES)
def test_changed_weights_are_used(change):
    conv, x = make(), images(16, 24, 9, 9)
    assert_right(conv, x)
    before = conv._packed
    change(conv)
    assert_right(conv, x)
    assert conv._packed is not before


SHARING = dict(
    data=lambda conv: conv.weight.data,
    detached=lambda conv: conv.weight.detach(),
    numpy=lambda conv: conv.weight.numpy(),
    state=lambda conv: conv.state_dict()['weight'].numpy(),
    shared=lambda conv: nn.Parameter(conv.weight.data),
)


@packs
@pytest.mark.parametrize('early', [False, True])
@pytest.mark.parametrize('kind', SHARING)
def test_writes_through_shared_memory_are_used(kind, early):
    """Whether it was taken before or after the weight was packed. Once it is gone, the weight is packed again.

    But for memory of which there was an array: PyTorch does not tell when that is gone.
    """
    conv, x = make(), images(16, 24, 9, 9)
    if not early:
        assert_right(conv, x)
    other = SHARING[kind](conv)
    for _ in range(2):
        assert_right(conv, x)
        with torch.no_grad():
            (other if isinstance(other, np.ndarray) else other.data)[:] += 1
        assert_right(conv, x)
    del other
    assert_right(conv, x)
    assert (conv._packed is None) == (kind in ('numpy', 'state'))


@packs
def test_memory_shared_with_numpy_or_a_process_is_not_packed():
    x = images(16, 24, 9, 9)
    array = np.random.default_rng(0).standard_normal((40, 24, 1, 1), np.float32)
    conv = make()
    conv.weight = nn.Parameter(torch.from_numpy(array), requires_grad=False)
    assert_right(conv, x)
    array *= 2
    assert_right(conv, x)
    conv = make().share_memory()
    assert_right(conv, x)
    assert conv._packed is None


@packs
def test_copies_use_their_own_weights():
    conv, x = make(), images(16, 24, 9, 9)
    assert_right(conv, x)
    average = ExponentialMovingAverage(conv)
    assert_right(average.module, x)
    for _ in range(2):
        other = make()
        average.update_parameters(other)
        assert_right(average.module, x)
        assert_right(conv, x)


@packs
def test_parameters_stay_parameters():
    """Files, compilers and optimizers see plain parameters."""
    conv, x = make(), images(16, 24, 9, 9)
    assert_right(conv, x)
    assert isinstance(conv.weight, nn.Parameter)
    file = io.BytesIO()
    torch.save(dict(state=conv.state_dict(), parameters=list(conv.parameters())), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert type(saved['state']['weight']) is torch.Tensor
    assert type(saved['parameters'][0]) is nn.Parameter
    assert not vars(saved['parameters'][0])
    compiled = torch.compile(conv, backend='eager', fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), conv(x))
        conv.weight.data.mul_(2)
    optimizer = torch.optim.SGD(conv.requires_grad_().parameters(), lr=1e-5)
    conv(x).square().sum().backward()
    optimizer.step()
    conv.requires_grad_(False)
    assert_right(conv, x)


def test_function_transforms():
    conv, x = make(), images(16, 24, 9, 9)
    assert_right(conv, x)
    _, tangent = torch.func.jvp(conv, (x,), (x,))
    torch.testing.assert_close(tangent, F.conv2d(x, conv.weight))
    maps = torch.randn(3, 16, 9, 9, 24).permute(0, 1, 4, 2, 3)
    for _ in range(2):
        torch.testing.assert_close(torch.vmap(conv)(maps), torch.stack([conv(x) for x in maps]))
    zeros = torch.zeros_like(conv.weight)
    for _ in range(2):
        out = torch.func.functional_call(conv, dict(weight=zeros), (x,))
        torch.testing.assert_close(out, conv.bias.view(-1, 1, 1).expand_as(out))
    assert_right(conv, x)


def test_copies_and_files_contain_the_weight_once():
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
    conv.to(memory_format=torch.channels_last)  # an inference tensor without a version
    assert_right(conv, x)
    with torch.backends.mkldnn.flags(enabled=False):
        conv = make()
        assert_right(conv, x)
        assert conv._packed is None


@pytest.mark.parametrize(
    ('owner', 'name'),
    [
        (torch._C, '_select_conv_backend'),
        (torch._C, '_storage_Use_Count'),
        (torch._C._functorch, 'peek_interpreter_stack'),
        (forward_ad, '_current_level'),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_plain_convolution_where_pytorch_lacks_a_private_function(owner, name, monkeypatch):
    monkeypatch.delattr(owner, name, raising=False)
    spec = importlib.util.spec_from_file_location('packed_without', packed.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    conv = module.PackedConv2d(**GEOMETRIES[0]).eval().requires_grad_(False)
    assert_right(conv, images(16, 24, 9, 9))
    assert conv._packed is None


def test_tracing_records_a_convolution():
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
