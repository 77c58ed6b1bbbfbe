"""Int8 files: which layers compute in int8, how far they are from float32, and which layers lose most."""

import numpy as np
import pytest
import torch
from randomize import randomize
from tiny_models import ARCH
from torch import nn
from versions import EXPORTS_ONNX

from mmevm.deployment import deploy
from mmevm.deployment.export import export_onnx
from mmevm.deployment.quantize import fuse_layers, layer_errors, quantize_onnx
from mmevm.deployment.session import OnnxSession
from mmevm.errors import ExportError
from mmevm.models import EfficientViM

if not EXPORTS_ONNX:
    pytest.skip('ONNX export needs torch 2.7', allow_module_level=True)
onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')


class Layers(nn.Module):
    """A layer of each kind; the weights of ``fine`` have few values, which int8 represents exactly."""

    def __init__(self):
        super().__init__()
        self.fine = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.GroupNorm(1, 8)
        self.coarse = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 4)
        nn.init.constant_(self.fine.weight, 0.5)

    def forward(self, x):
        x = self.coarse(self.norm(self.fine(x).relu())).softmax(1)
        return self.fc(x.mean((2, 3)))


def batches(count=4, size=32, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(1, 3, size, size)).astype(np.float32) for _ in range(count)]


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp('quantize') / 'float.onnx'
    export_onnx(Layers().eval(), file, torch.rand(2, 3, 32, 32), metadata=dict(classes='["a"]'))
    fuse_layers(file, file.with_name('fused.onnx'))
    return file.with_name('fused.onnx')


def integer_layers(file):
    """Return the operators whose weights are int8."""
    graph = onnx.load(file).graph
    int8 = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    weights = {node.output[0] for node in graph.node if node.op_type == 'DequantizeLinear' and node.input[0] in int8}
    return [node.op_type for node in graph.node if set(node.input) & weights]


def test_convolutions_and_linear_layers_are_int8_per_channel(source, tmp_path):
    assert quantize_onnx(source, tmp_path / 'int8.onnx', batches()) == 3
    assert integer_layers(tmp_path / 'int8.onnx') == ['Conv', 'Conv', 'Gemm']
    scales = {t.name: t for t in onnx.load(tmp_path / 'int8.onnx').graph.initializer}
    assert list(scales['model.coarse.weight_scale'].dims) == [8]
    x = batches(1, size=48, seed=1)[0]  # of another size
    (expected,), (out,) = OnnxSession(source)(x), OnnxSession(tmp_path / 'int8.onnx')(x)
    assert 0 < np.abs(out - expected).max() < 0.05 * np.abs(expected).max()


def test_metadata_is_kept(source, tmp_path):
    quantize_onnx(source, tmp_path / 'int8.onnx', batches())
    assert OnnxSession(tmp_path / 'int8.onnx').metadata == dict(classes='["a"]')


def test_openvino_compiles_for_each_image_size(tmp_path, monkeypatch):
    """For images of any size, OpenVINO's int8 layers may be wrong (mmevm/deployment/session.py)."""
    openvino = pytest.importorskip('openvino')
    export_onnx(Layers().eval(), tmp_path / 'float.onnx', torch.rand(2, 3, 32, 32), metadata=dict(precision='int8'))
    fuse_layers(tmp_path / 'float.onnx', tmp_path / 'fused.onnx')
    quantize_onnx(tmp_path / 'fused.onnx', tmp_path / 'int8.onnx', batches())
    sizes, compile_model = [], openvino.compile_model

    def record(model, *args):
        sizes.append(str(model.inputs[0].get_partial_shape()))
        return compile_model(model, *args)

    monkeypatch.setattr(openvino, 'compile_model', record)
    reference, session = OnnxSession(tmp_path / 'int8.onnx'), OnnxSession(tmp_path / 'int8.onnx', 'openvino')
    for count, height, width in [(1, 32, 32), (2, 40, 24), (2, 32, 32)]:
        x = np.random.default_rng(0).normal(size=(count, 3, height, width)).astype(np.float32)
        np.testing.assert_allclose(session(x)[0], reference(x)[0], atol=0.02)
    assert sizes == ['[?,3,32,32]', '[?,3,40,24]']


def test_layers_stay_in_float_if_asked(source, tmp_path):
    assert quantize_onnx(source, tmp_path / 'int8.onnx', batches(), ['coarse', 'f*c']) == 1
    assert integer_layers(tmp_path / 'int8.onnx') == ['Conv']
    with pytest.raises(ExportError, match=r'--float-layers corse: no layer has such a name\. Layers: fine, coarse, fc'):
        quantize_onnx(source, tmp_path / 'int8.onnx', batches(), ['corse'])


def test_errors_grow_with_the_noise_of_the_layers(source, tmp_path):
    """A layer that was calibrated on far too small images of the same kind clips, and the report shows it."""
    quantize_onnx(source, tmp_path / 'good.onnx', batches())
    quantize_onnx(source, tmp_path / 'bad.onnx', [batch / 100 for batch in batches()])
    good, bad = (layer_errors(source, tmp_path / name, batches(2)) for name in ('good.onnx', 'bad.onnx'))
    assert set(good) == set(bad) == {'fine', 'coarse', 'fc'}
    assert list(good.values()) == sorted(good.values())
    assert good['fine'] > 30
    assert bad['fine'] < 5


def test_backbone_in_deploy_mode(tmp_path):
    """The products of tokens and hidden states, softmax and LayerNorm keep float32."""
    torch.manual_seed(0)
    model = deploy(randomize(EfficientViM(ARCH)).eval())
    export_onnx(model, tmp_path / 'float.onnx', torch.rand(1, 3, 64, 64), dynamic=False)
    x = batches(8, size=64)
    fuse_layers(tmp_path / 'float.onnx', tmp_path / 'fused.onnx')
    count = quantize_onnx(tmp_path / 'fused.onnx', tmp_path / 'int8.onnx', x)
    graph = onnx.load(tmp_path / 'int8.onnx').graph
    assert integer_layers(tmp_path / 'int8.onnx') == ['Conv'] * count
    assert count == sum(node.op_type == 'Conv' for node in onnx.load(tmp_path / 'float.onnx').graph.node)
    dequantized = {output for node in graph.node if node.op_type == 'DequantizeLinear' for output in node.output}
    kinds = {node.op_type for node in graph.node if len(set(node.input) & dequantized) > 1}
    assert kinds == {'Conv', 'Add'}  # shortcuts add the outputs of two convolutions, in float32
    expected, out = OnnxSession(tmp_path / 'float.onnx')(x[0]), OnnxSession(tmp_path / 'int8.onnx')(x[0])
    for a, b in zip(out, expected, strict=True):
        assert np.linalg.norm(a - b) < 0.25 * np.linalg.norm(b)
