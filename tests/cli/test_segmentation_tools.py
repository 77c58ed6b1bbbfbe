"""Train, test, run, export and measure a segmentor with the tools, on a few generated images."""

import contextlib
import json
import re
from importlib.util import find_spec

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from command_line import ROOT, run_here, scalars, succeed
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from randomize import randomize
from tiny_models import normalize_features

from mmevm.analysis import build_without_weights
from mmevm.deployment.metadata import describe_preprocessing, parse_metadata
from mmevm.deployment.model_part import ModelPart
from mmevm.errors import ConfigError
from mmevm.inference.onnx import find_class_map, make_batch, prepare_image

pytest.importorskip('mmseg', reason='MMSegmentation is not installed')
from mmseg.structures import SegDataSample

CONFIG = ROOT / 'configs/demo/fpn-s8_evm_m1_shapes.py'
CLASSES = ['background', 'disk', 'box', 'triangle']
SIZE = 64


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp('shapes')
    numbers = ['--num-train', 8, '--num-val', 3, '--size', SIZE]
    succeed(ROOT / 'tools/make_shapes.py', root, *numbers, '--label-maps', cwd=root)
    return root


@pytest.fixture(scope='module')
def trained(shapes, tmp_path_factory):
    """The work dir after a training of four iterations, which is evaluated twice."""
    work_dir = tmp_path_factory.mktemp('trained')
    short = dict(max_iters=4, val_interval=2)
    options = [*(f'train_cfg.{key}={value}' for key, value in short.items()), 'default_hooks.logger.interval=1']
    options += ['default_hooks.checkpoint.interval=4', f'model.data_preprocessor.size="({SIZE},{SIZE})"']
    with pytest.MonkeyPatch.context() as monkeypatch:
        arguments = ['--data-root', shapes, '--work-dir', work_dir, '--cfg-options', *options]
        run_here(monkeypatch, ROOT / 'tools/train.py', CONFIG, *arguments)
    return work_dir


def run_test(shapes, trained, *arguments):
    """Run tools/test.py on the last checkpoint."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        data = ['--data-root', shapes, '--work-dir', trained / 'test']
        run_here(monkeypatch, ROOT / 'tools/test.py', CONFIG, trained / 'iter_4.pth', *data, *arguments)


@pytest.fixture(scope='module')
def predictions(shapes, trained, tmp_path_factory):
    """Labels that tools/test.py has written, (3, SIZE, SIZE). It must not read the label maps."""
    folder = tmp_path_factory.mktemp('predictions')
    options = ['test_dataloader.dataset.data_prefix.seg_map_path=none']
    run_test(shapes, trained, '--format-only', folder, '--cfg-options', *options)
    return read_all(folder)


def intersection_over_union(predictions, labels):
    """Return the mean over the classes, in percent. Classes that neither has do not count."""
    ious = []
    for i in range(len(CLASSES)):
        union = np.sum((predictions == i) | (labels == i))
        if union:
            ious.append(np.sum((predictions == i) & (labels == i)) / union)
    return 100 * np.mean(ious)


def read_all(folder):
    return np.stack([np.array(Image.open(path)) for path in sorted(folder.glob('*.png'))])


def test_training_is_logged_and_evaluated(trained):
    steps, evaluations = scalars(trained)
    assert [step['step'] for step in steps] == [1, 2, 3, 4]
    assert all(np.isfinite(step['decode.loss_ce']) for step in steps)
    assert [set(evaluation) >= {'mIoU', 'mAcc', 'aAcc'} for evaluation in evaluations] == [True, True]


def test_test_prints_classes_and_draws_pictures(shapes, trained, capfd, tmp_path):
    run_test(shapes, trained, '--show-dir', tmp_path / 'pictures')
    printed = ''.join(capfd.readouterr())
    assert all(f'| {name} ' in ' '.join(printed.split()) for name in CLASSES)
    assert f'mIoU: {scalars(trained)[1][-1]["mIoU"]:.4f}' in printed
    assert f'aAcc: {scalars(trained)[1][-1]["aAcc"]:.4f}' in printed
    pictures = list((tmp_path / 'pictures').iterdir())
    assert len(pictures) == 3
    assert all(cv2.imread(str(path)).shape == (SIZE, 2 * SIZE, 3) for path in pictures)  # beside the ground truth


def test_format_only_writes_the_evaluated_labels(predictions, shapes, trained):
    labels = read_all(shapes / 'labels/val')
    assert predictions.shape == labels.shape == (3, SIZE, SIZE)
    mean = intersection_over_union(predictions, labels)
    assert mean == pytest.approx(scalars(trained)[1][-1]['mIoU'], abs=0.01)


def test_check_prints_pixels_and_strides(monkeypatch, capfd, shapes, tmp_path):
    with contextlib.suppress(SystemExit):
        run_here(monkeypatch, ROOT / 'tools/train.py', CONFIG, '--data-root', shapes, '--check')
    printed = capfd.readouterr().out
    assert 'Check passed' in printed
    labels = read_all(shapes / 'labels/train')
    counts = ', '.join(f'{CLASSES[i]} {np.sum(labels == i)}' for i in np.argsort(-np.bincount(labels.ravel())))
    assert f'per class: {counts}' in printed
    assert 'model.backbone (EfficientViM) returns 64, 128, 192, 320 channels at stride 8, 16, 32, 64' in printed
    assert 'model.decode_head (FPNHead) takes 128 channels at stride 8, 16, 32, 64' in printed
    assert not (tmp_path / 'work_dirs').exists()


@pytest.mark.parametrize('options', [[], ['--deploy', '--batch-size', '2']])
def test_infer_equals_test(monkeypatch, options, predictions, shapes, trained, tmp_path):
    inputs = [CONFIG, trained / 'iter_4.pth', shapes / 'val', '--out-dir', tmp_path / 'out', '--device', 'cpu']
    run_here(monkeypatch, ROOT / 'tools/infer.py', *inputs, *options)
    found = read_all(tmp_path / 'out/preds')
    assert np.mean(found != predictions) < (1e-3 if options else 1e-9)
    result = json.loads((tmp_path / 'out/preds/000001.json').read_text())
    assert result['sem_seg'] == '000001.png'
    assert result['pixels'] == sorted(result['pixels'], reverse=True)
    assert [np.sum(found[1] == label) for label in result['labels']] == result['pixels']
    assert result['class_names'] == [CLASSES[label] for label in result['labels']]
    assert cv2.imread(str(tmp_path / 'out/vis/000001.png')).shape == (SIZE, SIZE, 3)


@pytest.fixture
def model(trained):
    model = build_without_weights(Config.fromfile(CONFIG)).eval()
    model.load_state_dict(torch.load(trained / 'iter_4.pth', weights_only=False)['state_dict'])
    return model


@torch.no_grad()
def test_parts_equal_predictions(model):
    images = torch.randn(2, 3, 95, 67)
    samples = model.predict(images)
    logits = torch.stack([sample.seg_logits.data for sample in samples])
    classes = torch.cat([sample.pred_sem_seg.data for sample in samples])
    part = ModelPart(model)
    assert part.part == 'model'
    assert part.output_names() == ['logits']
    assert logits.shape == (2, 4, 95, 67)
    torch.testing.assert_close(part(images), logits)
    part = ModelPart(model, 'class_map')
    assert part.output_names() == ['class_map']
    assert torch.equal(part(images), classes)
    assert ModelPart(model, 'neck').output_names() == ['stride8', 'stride16', 'stride32', 'stride64']


@pytest.mark.slow
def test_exported_file_equals_the_model(monkeypatch, model, trained, tmp_path, capfd):
    file = tmp_path / 'model.onnx'
    run_here(monkeypatch, ROOT / 'tools/export_onnx.py', CONFIG, trained / 'iter_4.pth', file, '--part', 'class_map')
    assert 'any but channels' in capfd.readouterr().out
    image = torch.randn(1, 3, 95, 67)
    with torch.no_grad():
        (sample,) = model.predict(image)
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    (output,) = session.run(None, dict(image=image.numpy()))
    expected = sample.pred_sem_seg.data.numpy()
    assert output.shape == expected.shape == (1, 95, 67)
    assert np.mean(output != expected) < 1e-3


@pytest.fixture(scope='module')
def resized(trained, tmp_path_factory):
    """A config whose images are resized with the logits resized back, and random weights that find all classes."""
    folder = tmp_path_factory.mktemp('resized')
    steps = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(96, 80), keep_ratio=True)]
    steps += [dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
    loader = f'test_dataloader = dict(dataset=dict(pipeline={steps!r}))'
    (folder / 'resized.py').write_text(f'_base_ = {str(CONFIG)!r}\n{loader}\n')
    torch.manual_seed(0)
    model = randomize(build_without_weights(Config.fromfile(CONFIG)))
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    normalize_features(model)
    torch.save(dict(state_dict=model.state_dict()), folder / 'weights.pth')
    return folder


def infer(shapes, folder, name, *model):
    """Return the label maps of tools/infer.py for the validation images."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        arguments = [shapes / 'val', '--out-dir', folder / name, '--device', 'cpu', '--batch-size', 2]
        run_here(monkeypatch, ROOT / 'tools/infer.py', *model, *arguments)
    return read_all(folder / name / 'preds')


@pytest.mark.slow
@pytest.mark.parametrize('part', ['model', 'class_map'])
def test_exported_file_is_run_and_evaluated_like_its_checkpoint(part, monkeypatch, shapes, resized, capfd, tmp_path):
    config, weights, file = resized / 'resized.py', resized / 'weights.pth', tmp_path / 'model.onnx'
    verify = ['--verify-images', shapes / 'val'] if part == 'model' else []
    run_here(monkeypatch, ROOT / 'tools/export_onnx.py', config, weights, file, '--part', part, *verify)
    expected, found = infer(shapes, tmp_path, 'pytorch', config, weights), infer(shapes, tmp_path, 'onnx', file)
    assert len(np.unique(expected)) > 2
    # A class map is resized without interpolation.
    assert np.mean(found != expected) < (1e-3 if part == 'model' else 0.1)
    result, reference = (
        json.loads((tmp_path / name / 'preds/000001.json').read_text()) for name in ('onnx', 'pytorch')
    )
    assert result['class_names'] == [CLASSES[label] for label in result['labels']]
    assert result.keys() == reference.keys()
    pictures = [cv2.imread(str(tmp_path / name / 'vis/000001.png')) for name in ('onnx', 'pytorch')]
    assert np.mean(pictures[0] != pictures[1]) < (1e-2 if part == 'model' else 0.2)
    capfd.readouterr()
    arguments = ['--data-root', shapes, '--work-dir', tmp_path / 'test']
    run_here(monkeypatch, ROOT / 'tools/test.py', config, file, *arguments)
    printed = re.search(r'mIoU: ([\d.]+)', ''.join(capfd.readouterr()))
    mean = intersection_over_union(found, read_all(shapes / 'labels/val'))
    assert float(printed[1]) == pytest.approx(mean, abs=0.01)


def test_class_map_is_not_verified_on_images(monkeypatch, shapes, trained, tmp_path):
    arguments = ['--part', 'class_map', '--verify-images', shapes / 'val']
    with pytest.raises(SystemExit, match=r'part=class_map cannot give the results of tools/infer\.py'):
        run_here(
            monkeypatch, ROOT / 'tools/export_onnx.py', CONFIG, trained / 'iter_4.pth', tmp_path / 'a.onnx', *arguments
        )


@pytest.mark.slow
def test_int8_file_is_compared_by_miou(monkeypatch, shapes, trained, capfd, tmp_path):
    options = ['--data-root', shapes, '--precision', 'int8', '--calibration', 'val', '--max-drop', 100]
    run_here(monkeypatch, ROOT / 'tools/export_onnx.py', CONFIG, trained / 'iter_4.pth', tmp_path / 'a.onnx', *options)
    found = re.search(r'^mIoU: ([\d.]+) in float32, ([\d.]+) in int8$', capfd.readouterr().out, re.MULTILINE)
    assert float(found[1]) == pytest.approx(scalars(trained)[1][-1]['mIoU'], abs=0.01)


def test_windows_are_not_verified(monkeypatch, shapes, trained, tmp_path):
    slide = ['model.test_cfg.mode=slide', 'model.test_cfg.crop_size="(64,64)"', 'model.test_cfg.stride="(32,32)"']
    arguments = ['--verify-images', shapes / 'val', '--cfg-options', *slide]
    with pytest.raises(SystemExit, match=r"--verify-images: model\.test_cfg\.mode='slide' in the config: an exported"):
        run_here(
            monkeypatch, ROOT / 'tools/export_onnx.py', CONFIG, trained / 'iter_4.pth', tmp_path / 'a.onnx', *arguments
        )


@pytest.mark.parametrize('test_cfg', [None, dict(size=(160, 128)), dict(size_divisor=64)])
def test_images_are_prepared_as_in_mmsegmentation(test_cfg):
    steps = [dict(type='Resize', scale=(130, 100), keep_ratio=True), dict(type='ResizeToMultiple', size_divisor=8)]
    cfg = Config.fromfile(CONFIG)
    cfg.model.data_preprocessor.update(size=None, test_cfg=test_cfg)
    cfg.test_dataloader.dataset.pipeline = [dict(type='LoadImageFromFile'), *steps, dict(type='PackSegInputs')]
    image = np.random.default_rng(0).integers(0, 256, (75, 90, 3), np.uint8)
    init_default_scope('mmseg')
    loaded = dict(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2], img_path='', seg_fields=[])
    data = Compose([*steps, dict(type='PackSegInputs')])(loaded)
    expected = MODELS.build(cfg.model.data_preprocessor)(pseudo_collate([data]))['inputs'].numpy()

    metadata = parse_metadata(describe_preprocessing(cfg), 'a.onnx')
    prepared, _ = prepare_image(image, metadata)
    np.testing.assert_allclose(make_batch([prepared], metadata), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_one_logit_for_two_classes(monkeypatch, shapes, tmp_path):
    two = dict(_delete_=True, classes=CLASSES[:2], palette=[(0, 0, 0), (255, 0, 0)])
    head = dict(num_classes=2, out_channels=1, threshold=0.4)
    text = f'_base_ = {str(CONFIG)!r}\nmodel = dict(decode_head={head})\n'
    text += f'test_dataloader = dict(dataset=dict(metainfo={two}))\n'
    (tmp_path / 'two.py').write_text(text)
    torch.manual_seed(0)
    model = randomize(build_without_weights(Config.fromfile(tmp_path / 'two.py')))
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    normalize_features(model)
    model.eval()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'two.pth')
    found = infer(shapes, tmp_path, 'out', tmp_path / 'two.py', tmp_path / 'two.pth')
    assert set(np.unique(found)) == {0, 1}

    image, sample = torch.randn(1, 3, 64, 96), SegDataSample(metainfo=dict(ori_shape=(50, 40), img_shape=(64, 96)))
    (predicted,) = model.predict(image, [sample])
    part = ModelPart(model)
    metadata = {key: json.loads(text) for key, text in part.describe_results().items() if key != 'task'}
    class_map = find_class_map(dict(logits=part(image)[0].numpy()), (64, 96), (50, 40), metadata)
    np.testing.assert_array_equal(class_map, predicted.pred_sem_seg.data[0].numpy())
    assert metadata == dict(num_classes=2, align_corners=False, threshold=0.4)


def test_flops_and_latency(monkeypatch, capfd, tmp_path):
    run_here(monkeypatch, ROOT / 'tools/get_flops.py', CONFIG)
    printed = capfd.readouterr().out
    assert 'Input: 1×3×192×192 (the crops of the training)' in printed
    assert 'UNKNOWN' not in printed
    options = ['--part', 'model', '--resolution', 64, '--batch-size', 1, '--rounds', 1, '--no-memory']
    run_here(monkeypatch, ROOT / 'tools/benchmark_latency.py', '--models', CONFIG, *options)
    assert 'could not be measured' not in capfd.readouterr().out


def test_missing_mmseg_is_explained(monkeypatch, trained):
    monkeypatch.setattr('mmevm.distributions.find_spec', lambda name: None if name == 'mmseg' else find_spec(name))
    photo = ROOT / 'docs/pictures/photos.jpg'
    with pytest.raises(SystemExit, match=r"ConfigError: default_scope='mmseg' needs MMSegmentation; .* pip install "):
        run_here(monkeypatch, ROOT / 'tools/infer.py', CONFIG, trained / 'iter_4.pth', photo)


def test_class_map_is_for_segmentors():
    classifier = build_without_weights(Config.fromfile(ROOT / 'configs/demo/efficientvim-m1_digits.py'))
    with pytest.raises(ConfigError, match='class_map is for segmentors'):
        ModelPart(classifier, 'class_map')
