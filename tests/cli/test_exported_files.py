"""tools/test.py with exported files, and int8 files of tools/export_onnx.py."""

import json
import pickle

import cv2
import numpy as np
import pytest
import torch
from command_line import ROOT, error_line, run, run_here, succeed
from mmengine.registry import MODELS, init_default_scope
from pycocotools import mask as rle
from randomize import randomize
from tiny_data import make_classifier, make_shapes
from tiny_models import write_classifier, write_shape_detector
from versions import EXPORTS_ONNX

from mmevm.errors import ConfigError
from mmevm.inference.quantization import quantize_file

if not EXPORTS_ONNX:
    pytest.skip('ONNX export needs torch 2.7', allow_module_level=True)
onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxscript')
pytest.importorskip('onnxruntime')
pytestmark = pytest.mark.slow

EXPORT, TEST = ROOT / 'tools/export_onnx.py', ROOT / 'tools/test.py'


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    """Config and checkpoint of a detector for generated images."""
    root = make_shapes(tmp_path_factory.mktemp('shapes'))
    return write_shape_detector(tmp_path_factory.mktemp('detector'), root)


@pytest.fixture(scope='module')
def file(detector):
    out = detector[0].with_suffix('.onnx')
    succeed(EXPORT, *detector, out, '--part', 'detections', cwd=out.parent)
    return out


def predictions(config, model, tmp_path, name, *arguments):
    succeed(TEST, config, model, '--out', tmp_path / f'{name}.pkl', '--work-dir', tmp_path, *arguments, cwd=tmp_path)
    with open(tmp_path / f'{name}.pkl', 'rb') as stream:
        return [sample['pred_instances'] for sample in pickle.load(stream)]


@pytest.mark.parametrize('engine', ['onnxruntime', 'openvino'])
def test_a_file_is_evaluated_like_its_checkpoint(engine, detector, file, tmp_path):
    pytest.importorskip(engine)
    config, checkpoint = detector
    expected = predictions(config, checkpoint, tmp_path, 'checkpoint')
    found = predictions(config, file, tmp_path, 'file', '--engine', engine)
    assert len(found) == len(expected) == 2
    for result, reference in zip(found, expected, strict=True):
        assert len(reference['scores']) > 1
        np.testing.assert_allclose(result['scores'], reference['scores'], atol=1e-4)
        np.testing.assert_allclose(result['bboxes'], reference['bboxes'], atol=0.02)
        masks, others = (rle.decode(side['masks']).astype(bool) for side in (result, reference))
        assert (masks ^ others).sum() < 1e-2 * (masks | others).sum()


def test_a_classifier_has_the_same_accuracy(tmp_path):
    cfg = make_classifier(tmp_path / 'data')
    cfg.dump(tmp_path / 'config.py')
    for i, path in enumerate(sorted((tmp_path / 'data').rglob('*.png'))):
        cv2.imwrite(str(path), np.full((32, 32, 3), 16 * i, np.uint8))
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    cfg.model.data_preprocessor = cfg.data_preprocessor
    torch.save(dict(state_dict=randomize(MODELS.build(cfg.model)).state_dict()), tmp_path / 'weights.pth')
    files = [tmp_path / 'config.py', tmp_path / 'weights.pth', tmp_path / 'out.onnx']
    succeed(EXPORT, *files, cwd=tmp_path)
    scores = []
    for name in ('weights.pth', 'out.onnx'):
        succeed(TEST, tmp_path / 'config.py', name, '--out', f'{name}.pkl', '--work-dir', 'work', cwd=tmp_path)
        with open(tmp_path / f'{name}.pkl', 'rb') as stream:
            scores.append(np.stack([np.asarray(sample['pred_score']) for sample in pickle.load(stream)]))
    np.testing.assert_allclose(*scores, atol=2e-6)
    assert scores[0].std(0).max() > 1e-5  # random weights hardly tell the images apart


def test_a_file_for_another_task_is_refused(file, tmp_path):
    config, _ = write_classifier(tmp_path)
    result = run(TEST, config, file, cwd=tmp_path)
    assert "is a model for instance segmentation, but default_scope='mmpretrain'" in error_line(result)


def test_int8_file(detector, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'int8.onnx'
    arguments = ['--part', 'detections', '--precision', 'int8', '--calibration', 'test', '--max-drop', '100']
    run_here(monkeypatch, EXPORT, *detector, out, *arguments, '--float-layers', 'backbone.*')
    printed = capsys.readouterr().out
    assert 'in int8, calibrated on 2 images' in printed
    assert 'coco/bbox_mAP: ' in printed
    assert '| rpn_head.rpn_cls' in printed
    assert '| backbone.' not in printed
    entries = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert entries['precision'] == 'int8'
    assert json.loads(entries['classes']) == ['shape']
    assert sorted(path.name for path in tmp_path.iterdir()) == ['int8.onnx']


def test_no_file_is_written_if_too_much_is_lost(detector, tmp_path, monkeypatch):
    arguments = ['--part', 'detections', '--precision', 'int8', '--calibration', 'test', '--max-drop', '-1']
    with pytest.raises(SystemExit, match=r'bbox_mAP falls from .* more than --max-drop -1.0: the file was not written'):
        run_here(monkeypatch, EXPORT, *detector, tmp_path / 'int8.onnx', *arguments)
    assert list(tmp_path.iterdir()) == []


def test_missing_data_is_reported_before_the_export(detector, tmp_path, monkeypatch):
    images = ROOT / 'docs/pictures'
    arguments = ['--part', 'detections', '--precision', 'int8', '--calibration', images, '--max-drop', '1']
    missing = ['--cfg-options', 'test_dataloader.dataset.ann_file=none.json']
    with pytest.raises(SystemExit, match=r'ConfigError: test_dataloader\.dataset cannot be read: .*none\.json'):
        run_here(monkeypatch, EXPORT, *detector, tmp_path / 'int8.onnx', *arguments, *missing)


def test_calibration_needs_images(detector, tmp_path, monkeypatch):
    (tmp_path / 'a.mp4').touch()
    arguments = ['--part', 'detections', '--precision', 'int8', '--calibration', tmp_path]
    with pytest.raises(SystemExit, match=r'ConfigError: --calibration .*: there are only videos'):
        run_here(monkeypatch, EXPORT, *detector, tmp_path / 'int8.onnx', *arguments)


def test_unreadable_calibration_image_is_named(file, tmp_path):
    (tmp_path / 'cut.png').write_bytes(b'\x89PNG')
    entries = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    with pytest.raises(ConfigError, match=r'Calibration image .*cut\.png cannot be read'):
        quantize_file(file, tmp_path / 'int8.onnx', None, entries, [str(tmp_path / 'cut.png')])
    assert not (tmp_path / 'int8.onnx').exists()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--precision', 'int8'], '--precision int8 needs --calibration'),
        (['--max-drop', '1'], '--calibration, --max-drop and --float-layers are for --precision int8'),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, message, detector, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_here(monkeypatch, EXPORT, *detector, tmp_path / 'a.onnx', *arguments)
    assert message in capsys.readouterr().err
