"""Engines for ONNX files: what they load, what they refuse, and on which CPUs a precision is not faster."""

import numpy as np
import pytest
import torch
from torch import nn
from versions import EXPORTS_ONNX

from mmevm.deployment.session import OnnxSession, check_engine, describe_missing_instructions
from mmevm.errors import EngineError

needs_export = pytest.mark.skipif(not EXPORTS_ONNX, reason='ONNX export needs torch 2.7')


@needs_export
@pytest.mark.parametrize('engine', ['onnxruntime', 'openvino'])
def test_engines_agree_and_describe_the_file(engine, tmp_path):
    pytest.importorskip(engine)
    pytest.importorskip('onnxscript')
    from mmevm.deployment.export import export_onnx

    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3).eval()
    file = tmp_path / 'a.onnx'
    export_onnx(model, file, torch.rand(2, 3, 16, 24), output_names=['out'], metadata=dict(classes='["a"]'))
    session = OnnxSession(file, engine)
    assert session.input_shape == [None, 3, None, None]
    assert session.output_names == ['out']
    assert session.metadata == dict(classes='["a"]')
    x = torch.rand(1, 3, 20, 18)
    np.testing.assert_allclose(session(x.numpy())[0], model(x).detach().numpy(), atol=1e-5)


def test_size_that_openvino_cannot_compile_is_named(tmp_path):
    pytest.importorskip('openvino')
    onnx = pytest.importorskip('onnx')
    image = onnx.helper.make_tensor_value_info('x', onnx.TensorProto.FLOAT, ['b', 3, 'h', 'w'])
    out = onnx.helper.make_tensor_value_info('y', onnx.TensorProto.FLOAT, None)
    ones = onnx.numpy_helper.from_array(np.ones((1, 3, 8, 16), np.float32), 'ones')
    graph = onnx.helper.make_graph([onnx.helper.make_node('Add', ['x', 'ones'], ['y'])], 'add', [image], [out], [ones])
    proto = onnx.helper.make_model(graph, ir_version=10, opset_imports=[onnx.helper.make_opsetid('', 18)])
    onnx.helper.set_model_props(proto, dict(precision='int8'))
    onnx.save(proto, tmp_path / 'add.onnx')
    session = OnnxSession(tmp_path / 'add.onnx', 'openvino')
    x = np.zeros((1, 3, 8, 16), np.float32)
    np.testing.assert_array_equal(session(x)[0], x + 1)
    with pytest.raises(EngineError, match=r'add\.onnx cannot be compiled by OpenVINO for images of 7×16: .*shape'):
        session(x[:, :, :7])


def test_unknown_engines_and_dtypes_are_refused():
    with pytest.raises(EngineError, match="engine='tvm' is not one of onnxruntime, openvino"):
        check_engine('tvm')
    with pytest.raises(EngineError, match='onnxruntime supports float32, not bfloat16'):
        check_engine('onnxruntime', 'bfloat16')


@pytest.mark.parametrize(
    ('capabilities', 'missing'),
    [
        (dict(architecture='x86_64', cpu_name='Old', avx512_vnni=False), {'int8', 'bfloat16'}),
        (dict(architecture='x86_64', avx_vnni=True), {'bfloat16'}),
        (dict(architecture='x86_64', avx512_vnni=True, avx512_bf16=True), set()),
        (dict(architecture='arm64'), set()),  # not known
    ],
)
def test_missing_instructions(capabilities, missing, monkeypatch):
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: capabilities, raising=False)
    found = {precision: describe_missing_instructions(precision) for precision in ('int8', 'bfloat16')}
    assert {precision for precision, text in found.items() if text} == missing
    if 'cpu_name' in capabilities:
        assert found['int8'] == (
            'Old has no instructions for int8 (avx512_vnni, avx_vnni, amx_int8), so it will not be faster than float32 '
            'here.'
        )
