"""Whole detectors: stages, number of objects, and the same objects in each engine."""

import statistics
from itertools import product

import numpy as np
import pytest
import torch
from command_line import ROOT
from mmengine.config import Config
from tiny_models import ARCH, shrink
from versions import EXPORTS_ONNX

from mmevm.analysis import build_without_weights
from mmevm.analysis.latency import ModelSpec, Setting, benchmark, table
from mmevm.analysis.latency import detector as whole
from mmevm.errors import ConfigError, EngineError

KINDS = ['rtmdet/rtmdet_evm_m1.py', 'maskrcnn_evm_m1.py']


def make_model(kind):
    cfg = Config.fromfile(ROOT / 'configs' / kind)
    shrink(cfg.model)
    torch.manual_seed(0)
    return build_without_weights(cfg).eval()


def make_calls(kind, engine, tmp_path, size=(64, 96), batch_size=2):
    if engine in ('onnxruntime', 'openvino'):
        pytest.importorskip(engine)
        if not EXPORTS_ONNX:
            pytest.skip('ONNX export needs torch 2.7')
    form = dict(device='cpu', dtype=torch.float32)
    return whole.make_detector_calls(make_model(kind), size, batch_size, engine, 'float32', form, tmp_path / 'files')


@pytest.mark.parametrize(
    ('kind', 'engine'),
    [
        *product(KINDS, ('eager', 'onnxruntime')),
        pytest.param(KINDS[0], 'compile', marks=pytest.mark.slow),
    ],
)
def test_calls_compute_the_stages(kind, engine, tmp_path, monkeypatch):
    monkeypatch.setattr(whole, 'OBJECTS', 5)
    calls = make_calls(kind, engine, tmp_path)
    images = calls['preprocessing']()
    assert (images.shape, images.dtype) == ((2, 3, 64, 96), np.float32)
    outputs = [torch.as_tensor(x) for x in torch.utils._pytree.tree_flatten(calls['network']())[0]]
    with torch.no_grad():
        model = make_model(kind)
        features = model.extract_feat(torch.from_numpy(images))
        if kind.startswith('rtmdet'):
            features = [x for maps in model.bbox_head(features) for x in maps]
    for out, ref in zip(outputs, features, strict=True):
        torch.testing.assert_close(out, ref, atol=1e-4, rtol=1e-4)
    _, labels, *masks = calls['whole']()
    assert abs(int((torch.as_tensor(labels) >= 0).sum()) - 2 * 5) <= 2  # rounding may decide about the last ones
    assert len(masks) == kind.startswith('maskrcnn')


def make_dino():
    cfg = Config.fromfile(ROOT / 'configs/dino/dino_evm_m4.py')
    cfg.model.backbone.update(arch=ARCH, init_cfg=None)
    cfg.model.neck.in_channels = [16, 32, 48]
    for part in ('encoder', 'decoder'):
        cfg.model[part].num_layers = 1
    cfg.model.update(num_queries=20, test_cfg=dict(max_per_img=7))
    torch.manual_seed(0)
    return build_without_weights(cfg).eval()


def test_transformers_run_in_pytorch(tmp_path):
    form = dict(device='cpu', dtype=torch.float32)
    calls = whole.make_detector_calls(make_dino(), (64, 96), 2, 'eager', 'float32', form, tmp_path)
    with torch.no_grad():
        features = make_dino().extract_feat(torch.from_numpy(calls['preprocessing']()))
    for out, ref in zip(calls['network'](), features, strict=True):
        torch.testing.assert_close(out, ref, atol=1e-4, rtol=1e-4)
    dets, labels = calls['whole']()
    assert dets.shape == (2, 7, 5)
    assert (labels >= 0).all()
    with pytest.raises(EngineError, match='the post-processing of DINO cannot be exported'):
        whole.make_detector_calls(make_dino(), (64, 96), 2, 'onnxruntime', 'float32', form, tmp_path)


def test_preprocessing_keeps_the_aspect_ratio():
    image = np.full((480, 640, 3), 255, np.uint8)
    x = whole.preprocess(image, (320, 320))
    assert (x[:, :240] > 2).all()
    assert (x[:, 240:] == 0).all()
    np.testing.assert_allclose(x[:, 0, 0], (255 - np.array([123.675, 116.28, 103.53])) / [58.395, 57.12, 57.375], 1e-5)


def test_rows_have_the_times_of_the_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(ModelSpec, '_build', lambda self: make_model(KINDS[0]))
    spec = ModelSpec(str(ROOT / 'configs' / KINDS[0]), 'detector')
    (row,) = benchmark([spec], [Setting(64, 2, width=96)], rounds=3, memory=False)
    assert row.error is None
    assert list(row.stages) == ['preprocessing', 'network']
    assert [len(times) for times in (row.seconds, *row.stages.values())] == [3, 3, 3]
    stages = row.stage_milliseconds
    rest = statistics.median(a - b - c for a, b, c in zip(row.seconds, *row.stages.values(), strict=True))
    assert stages['post-processing'] == pytest.approx(500 * rest)  # per image
    header, line = (text.split('|') for text in table([row], spec.name).splitlines()[2:5:2])
    shown = {name.strip(): cell.strip() for name, cell in zip(header, line, strict=True)}
    assert float(shown['network']) == pytest.approx(stages['network'], abs=0.006)


def test_only_detectors_are_accepted():
    with pytest.raises(ValueError, match='m1 is no detector'):
        ModelSpec('m1', 'detector')
    with pytest.raises(ConfigError, match=r"default_scope='mmpretrain', but --part detector is for detectors"):
        ModelSpec(str(ROOT / 'configs/classification/efficientvim-m1_300e_in1k.py'), 'detector')


@pytest.mark.skipif(not EXPORTS_ONNX, reason='ONNX export needs torch 2.7')
def test_onnx_files_run_in_the_engines_for_them(tmp_path):
    pytest.importorskip('onnxruntime')
    from mmevm.deployment.export import export_onnx

    file = tmp_path / 'a.onnx'
    export_onnx(torch.nn.Conv2d(3, 4, 3).eval(), file, torch.rand(1, 3, 16, 16), dynamic=False)
    eager, other = benchmark([str(file)], [Setting(16, 1)], ['eager', 'onnxruntime'], rounds=2, memory=False)
    assert 'is an ONNX file, which only onnxruntime and openvino run' in eager.error
    assert (other.error, len(other.seconds)) == (None, 2)
    with pytest.raises(ValueError, match=r'none\.onnx: there is no such file'):
        ModelSpec('none.onnx')
