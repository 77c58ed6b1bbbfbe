"""The inferencers of both tasks agree with those they are built on."""

import json

import cv2
import mmcv
import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmpretrain import ImageClassificationInferencer
from tiny_models import DIGITS, write_classifier

from mmevm.errors import CheckpointError, ConfigError
from mmevm.inference import build_inferencer


def build(files, **options):
    config, checkpoint = files
    return build_inferencer(Config.fromfile(config), str(checkpoint), 'cpu', **options)


def without(result, *keys):
    return {key: value for key, value in result.items() if key not in keys}


@pytest.fixture(scope='session')
def built(detector):
    return build(detector)


@pytest.fixture(scope='session')
def reference(detector):
    """MMDetection's own inferencer, with the checkpoint read safely."""
    config, checkpoint = detector
    return DetInferencer(str(config), f'safe://{checkpoint}', 'cpu', show_progress=False)


def test_detections_equal_those_of_DetInferencer(built, reference, images, tmp_path):
    reference(str(images), out_dir=str(tmp_path), no_save_pred=False, no_save_vis=True)
    for name in ('a', 'b'):
        (path,) = images.glob(f'{name}.*')
        ((result, _),) = built.infer([built.read(str(path))])
        expected = json.loads((tmp_path / f'preds/{name}.json').read_text())
        assert expected['bboxes']
        assert expected['masks']
        assert json.loads(json.dumps(without(result, 'class_names'))) == expected


def test_pictures_equal_those_of_DetInferencer(built, reference, images, tmp_path):
    path = images / 'a.png'
    np.random.seed(0)  # mmdet varies the colors of masks
    ((_, picture),) = built.infer([built.read(str(path))], score_thr=0.1)
    np.random.seed(0)
    reference(str(path), out_dir=str(tmp_path), pred_score_thr=0.1)
    assert (picture != cv2.imread(str(path))).any()
    np.testing.assert_array_equal(picture, cv2.imread(str(tmp_path / 'vis/a.png')))


def test_nothing_is_drawn_above_the_threshold(built, images):
    ((result, picture),) = built.infer([built.read(str(images / 'a.png'))], score_thr=1.0)
    assert result['scores']
    np.testing.assert_array_equal(picture, cv2.imread(str(images / 'a.png')))


def test_images_of_several_sizes_in_one_batch(built, images):
    read = [built.read(str(images / name)) for name in ('a.png', 'b.jpg')]
    together = built.infer(read, draw=False)
    for image, (result, picture) in zip(read, together, strict=True):
        assert picture is None
        assert len(result['bboxes']) == len(built.infer([image], draw=False)[0][0]['bboxes'])


def test_deploy_mode_finds_the_same_objects(detector, built, images):
    image = built.read(str(images / 'a.png'))
    ((expected, _),), ((result, _),) = built.infer([image]), build(detector, deploy_mode=True).infer([image])
    assert result['labels'] == expected['labels']
    np.testing.assert_allclose(result['scores'], expected['scores'], atol=1e-4)
    np.testing.assert_allclose(result['bboxes'], expected['bboxes'], atol=0.05)


def with_meta(detector, folder, meta):
    """The same files, with other metadata in the checkpoint."""
    config, checkpoint = detector
    torch.save(torch.load(checkpoint) | dict(meta=meta), folder / 'detector.pth')
    return config, folder / 'detector.pth'


def test_each_label_has_a_class_name(built, images):
    ((result, _),) = built.infer([built.read(str(images / 'a.png'))])
    assert result['class_names'] == [('disc', 'box')[label] for label in result['labels']]


@pytest.mark.parametrize(
    ('meta', 'classes'),
    [
        ({}, ('disc', 'box')),  # of the config
        (dict(dataset_meta=dict(classes=('x', 'y'))), ('x', 'y')),
        (dict(CLASSES=('x', 'y')), ('x', 'y')),  # MMDetection 2
    ],
)
def test_class_names_come_from_the_checkpoint_then_the_config(detector, tmp_path, meta, classes):
    inferencer = build(with_meta(detector, tmp_path, meta))
    assert inferencer.model.dataset_meta['classes'] == classes
    assert inferencer.model.dataset_meta['palette'] == [(220, 20, 60), (20, 60, 220)]


def test_labels_are_numbers_if_no_class_names_fit(detector, images, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr('mmevm.inference.model.print_log', lambda message, *_: messages.append(message))
    config, checkpoint = with_meta(detector, tmp_path, {})
    cfg = Config.fromfile(config)
    del cfg.test_dataloader.dataset.metainfo  # COCO's 80 names remain
    inferencer = build_inferencer(cfg, str(checkpoint), 'cpu')
    (message,) = messages
    assert 'test_dataloader.dataset of the config has 80; expected: 2' in message
    ((result, _),) = inferencer.infer([inferencer.read(str(images / 'a.png'))], score_thr=0.1)
    assert result['class_names'] == [f'class {label}' for label in result['labels']]


def test_checkpoint_must_have_every_tensor(detector, tmp_path):
    config, checkpoint = detector
    content = torch.load(checkpoint)
    del content['state_dict']['backbone.stages.0.blocks.0.alpha']
    torch.save(content, tmp_path / 'incomplete.pth')
    with pytest.raises(CheckpointError, match=r'backbone\.stages\.0\.blocks\.0\.alpha'):
        build((config, tmp_path / 'incomplete.pth'))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(default_scope='mmrotate'), "default_scope='mmrotate'"),
        (dict(test_dataloader=None), 'test_dataloader is missing'),
        (dict(model=None), 'model is missing'),
    ],
)
def test_unusable_configs(detector, changes, message):
    cfg = Config.fromfile(detector[0])
    for key, value in changes.items():
        cfg[key] = value
    with pytest.raises(ConfigError, match=message):
        build_inferencer(cfg, str(detector[1]))


@pytest.mark.parametrize('device', ['gpu', 'cuda:99'])
def test_unusable_devices(detector, device):
    with pytest.raises(ConfigError, match=f'--device {device} cannot be used'):
        build_inferencer(Config.fromfile(detector[0]), str(detector[1]), device)


def test_init_detector_takes_configs_and_checkpoints(detector, built, images):
    model = init_detector(*map(str, detector), device='cpu')
    found = inference_detector(model, str(images / 'a.png')).pred_instances
    ((expected, _),) = built.infer([built.read(str(images / 'a.png'))])
    assert found.bboxes.tolist() == expected['bboxes']


@pytest.mark.parametrize('load', [init_detector, DetInferencer])
def test_mmdet_loads_checkpoints_of_a_training_safely(detector, tmp_path, load):
    """With ``safe://``. Without it, MMEngine 0.10.7 cannot read them on torch 2.6 and later."""
    config, checkpoint = detector
    content = torch.load(checkpoint) | dict(message_hub=dict(loss=HistoryBuffer([1.0], [1])))
    torch.save(content, tmp_path / 'epoch_1.pth')
    model = load(str(config), f'safe://{tmp_path}/epoch_1.pth', device='cpu')
    state = getattr(model, 'model', model).state_dict()
    assert all(state[name].equal(tensor) for name, tensor in content['state_dict'].items())


def test_classes_equal_those_of_ImageClassificationInferencer(classifier, images):
    config, checkpoint = classifier
    inferencer = build(classifier)
    paths = [str(images / name) for name in ('a.png', 'b.jpg')]
    results = [result for result, _ in inferencer.infer([inferencer.read(path) for path in paths])]
    reference = ImageClassificationInferencer(str(config), str(checkpoint), device='cpu', classes=DIGITS)
    for result, expected in zip(results, reference(paths, batch_size=2), strict=True):
        assert result == expected | dict(pred_scores=expected['pred_scores'].tolist())
        assert result['pred_class'] == DIGITS[result['pred_label']]


def test_class_is_written_into_the_picture(classifier, images):
    inferencer = build(classifier)
    image = inferencer.read(str(images / 'b.jpg'))
    ((_, picture),) = inferencer.infer([image])
    assert picture.shape == (336, 224, 3)  # enlarged, so that the text is legible
    # Away from the text, colors are those of the image.
    below = np.abs(picture[200:].astype(int) - mmcv.imresize(image, (224, 336))[200:])
    assert below.max() <= 1


def test_deploy_mode_gives_the_same_classes(classifier, images):
    plain, fused = build(classifier), build(classifier, deploy_mode=True)
    image = plain.read(str(images / 'a.png'))
    ((expected, _),), ((result, _),) = plain.infer([image]), fused.infer([image])
    np.testing.assert_allclose(result['pred_scores'], expected['pred_scores'], atol=1e-4)


def test_classifier_takes_class_names_of_the_checkpoint(tmp_path):
    names = tuple('abcdefghij')
    assert build(write_classifier(tmp_path, dataset_meta=dict(classes=names))).classes == names
