"""Every engine computes the outputs of the model, and reports unsupported settings."""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from versions import EXPORTS_ONNX

from mmevm.analysis.latency import prepare
from mmevm.errors import EngineError

ONNX_ENGINES = ['onnxruntime', 'openvino']
needs_export = pytest.mark.skipif(not EXPORTS_ONNX, reason='ONNX export needs torch 2.7')
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')


class TwoMaps(nn.Module):
    """A convolution with norm and ReLU, and outputs of two sizes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        return x, [self.last(x[..., ::2, ::2])]


@pytest.fixture
def model():
    return TwoMaps().eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 16, 24)


def outputs(result):
    """Return all outputs of an engine as tensors."""
    leaves = torch.utils._pytree.tree_flatten(result)[0]
    return [torch.as_tensor(leaf).float().cpu() for leaf in leaves]


def assert_same(result, model, x, tolerance=1e-5):
    with torch.no_grad():
        expected = outputs(model(x))
    for out, ref in zip(outputs(result), expected, strict=True):
        assert out.shape == ref.shape
        assert (out - ref).abs().max() < tolerance * ref.abs().max()


@pytest.mark.parametrize(
    'engine',
    [
        'eager',
        pytest.param('compile', marks=pytest.mark.slow),
        pytest.param('cudagraph', marks=on_a_gpu),
        *(pytest.param(engine, marks=needs_export) for engine in ONNX_ENGINES),
    ],
)
def test_outputs_equal_those_of_the_model(engine, model, x, tmp_path):
    if engine in ONNX_ENGINES:
        pytest.importorskip(engine)
    if engine == 'cudagraph':
        model, x = model.cuda(), x.cuda()
    reference = TwoMaps().eval()
    reference.load_state_dict(model.state_dict())
    reference.to(x.device)
    call = prepare(engine, model, x, onnx_file=tmp_path / 'model.onnx')
    for given in (x, x.flip(0) + 1, x.contiguous(memory_format=torch.channels_last)):
        result = call(given)
        assert_same(result, reference, given)


def test_inference_needs_no_gradients(model, x):
    result, _ = prepare('eager', model, x)(x)
    assert not result.requires_grad


def test_outputs_have_the_requested_dtype(model, x):
    _, (out,) = prepare('eager', model, x, 'autocast-bfloat16')(x)
    assert out.dtype == torch.bfloat16
    _, (out,) = prepare('eager', model, x)(x)
    assert out.dtype == torch.float32
    _, (out,) = prepare('eager', model.bfloat16(), x.bfloat16(), 'bfloat16')(x.bfloat16())
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize('engine', ['eager', pytest.param('compile', marks=pytest.mark.slow)])
def test_training_computes_the_gradients_of_one_backward_pass(engine, x):
    model = nn.Conv2d(3, 4, 1).train()
    call = prepare(engine, model, x, training=True)
    call(x)
    call(x)
    # of the sum of all outputs
    expected = x.sum((0, 2, 3)).expand(4, 3)
    torch.testing.assert_close(model.weight.grad.flatten(1), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(model.bias.grad, torch.full((4,), 2.0 * 16 * 24))


@needs_export
@pytest.mark.parametrize('engine', ONNX_ENGINES)
def test_an_existing_onnx_file_is_used(engine, model, x, tmp_path):
    pytest.importorskip(engine)
    file = tmp_path / 'model.onnx'
    prepare('onnxruntime', model, x, onnx_file=file)
    other = TwoMaps().eval()
    assert_same(prepare(engine, other, x, onnx_file=file)(x), model, x)


@needs_export
def test_openvino_computes_in_bfloat16_if_asked(model, x, tmp_path):
    openvino = pytest.importorskip('openvino')
    if 'BF16' not in openvino.Core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES'):
        with pytest.raises(EngineError, match='openvino cannot compute in bfloat16 on this CPU'):
            prepare('openvino', model, x, 'bfloat16', onnx_file=tmp_path / 'model.onnx')
        return
    call = prepare('openvino', model, x, 'bfloat16', onnx_file=tmp_path / 'model.onnx')
    assert_same(call(x), model, x, tolerance=2e-2)
    with pytest.raises(AssertionError):
        assert_same(call(x), model, x, tolerance=1e-5)


@needs_export
def test_onnx_runtime_uses_as_many_threads_as_pytorch(model, x, tmp_path):
    pytest.importorskip('onnxruntime')
    tasks = Path('/proc/self/task')
    if not tasks.exists():
        pytest.skip('needs /proc')
    file = tmp_path / 'model.onnx'
    before = torch.get_num_threads()
    kept, counts = [], []
    for threads in (1, 1, 4):
        torch.set_num_threads(threads)
        kept.append(prepare('onnxruntime', model, x, onnx_file=file))
        counts.append(len(os.listdir(tasks)))
    torch.set_num_threads(before)
    assert counts[1] == counts[0]  # one is the caller's own
    assert counts[2] == counts[1] + 3


@pytest.mark.parametrize('engine', ONNX_ENGINES)
def test_a_missing_package_is_reported(engine, model, x, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, engine, None)
    with pytest.raises(EngineError, match=f'{engine} is not installed. Run pip install'):
        prepare(engine, model, x, onnx_file=tmp_path / 'model.onnx')


@pytest.mark.parametrize(
    ('engine', 'kwargs', 'message'),
    [
        ('cudagraph', dict(), 'needs a GPU'),
        ('onnxruntime', dict(training=True), 'supports inference only'),
        ('openvino', dict(training=True), 'supports inference only'),
        ('onnxruntime', dict(dtype='float16'), 'onnxruntime supports float32, not float16'),
        ('onnxruntime', dict(dtype='autocast-bfloat16'), 'onnxruntime supports float32, not bfloat16'),
        ('openvino', dict(dtype='float16'), 'openvino supports float32 and bfloat16, not float16'),
    ],
)
def test_unsupported_settings_are_reported(engine, kwargs, message, model, x, tmp_path):
    with pytest.raises(EngineError, match=message):
        prepare(engine, model, x, onnx_file=tmp_path / 'model.onnx', **kwargs)


def test_a_missing_onnx_file_is_refused(model, x):
    pytest.importorskip('onnxruntime')
    with pytest.raises(ValueError, match='onnx_file'):
        prepare('onnxruntime', model, x)
