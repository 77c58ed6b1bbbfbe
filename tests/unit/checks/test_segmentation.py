"""Mistakes in label maps are named before the first iteration."""

import contextlib
import re

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, TRANSFORMS, init_default_scope
from PIL import Image

from mmevm.checks.data import summarize, summarize_all
from mmevm.checks.explain import explain, explain_dataset_error
from mmevm.checks.model import FeatureTracer, compare_class_counts
from mmevm.errors import ConfigError

pytest.importorskip('mmseg', reason='MMSegmentation is not installed')

from mmseg.structures import SegDataSample

CLASSES = ('cat', 'dog', 'sky')
HEIGHT, WIDTH = 20, 30


@pytest.fixture
def root(tmp_path):
    """Three images with label maps of three classes and pixels to ignore."""
    (tmp_path / 'images').mkdir()
    (tmp_path / 'labels').mkdir()
    for i in range(3):
        Image.new('RGB', (WIDTH, HEIGHT), (i, 9, 9)).save(tmp_path / f'images/{i}.jpg')
        write_labels(tmp_path, i, [0, 1, 2, 255])
    return tmp_path


def write_labels(root, i, values, size=(HEIGHT, WIDTH), dtype=np.uint8):
    labels = np.resize(np.array(values, dtype), size)
    Image.fromarray(labels).save(root / f'labels/{i}.png')
    return labels


def build(root, kind='BaseSegDataset', pipeline=None, **kwargs):
    init_default_scope('mmseg')
    steps = [dict(type=name) for name in pipeline or ('LoadImageFromFile', 'LoadAnnotations', 'PackSegInputs')]
    kwargs.setdefault('metainfo', dict(classes=CLASSES))
    prefix = dict(img_path='images', seg_map_path='labels')
    return DATASETS.build(dict(type=kind, data_root=str(root), data_prefix=prefix, pipeline=steps, **kwargs))


def check(root, key='train_dataloader.dataset', **kwargs):
    return summarize(key, build(root, **kwargs), training=key.startswith('train'))


def refuse(root, message, **kwargs):
    with pytest.raises(ConfigError, match=message) as error:
        check(root, **kwargs)
    assert '\n' not in str(error.value)
    assert str(error.value).startswith(kwargs.get('key', 'train_dataloader.dataset'))


def test_correct_maps(root):
    summary = check(root)
    assert summary.warnings == []
    labels = np.resize([0, 1, 2, 255], (HEIGHT, WIDTH))
    assert dict(summary.objects) == {i: 3 * np.sum(labels == i) for i in range(3)}
    assert str(summary) == 'train_dataloader.dataset (BaseSegDataset): 3 images'
    assert summary.per_class().startswith('sky 450, dog 450, cat 450')


def test_palette_images_have_indices(root):
    image = Image.fromarray(np.resize(np.array([0, 1, 2], np.uint8), (HEIGHT, WIDTH)))
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    image.save(root / 'labels/1.png')
    assert check(root).warnings == []


def test_labels_outside_the_classes(root):
    write_labels(root, 1, [0, 7, 254])
    message = (
        r'1 of 3 label maps .* labels outside of the 3 classes \(0 to 2, and 255 .*1\.png has 7, 254\. '
        r'Correct the maps, or train_dataloader\.dataset\.metainfo\.classes\.'
    )
    refuse(root, message)
    (warning,) = check(root, key='val_dataloader.dataset').warnings  # the metric ignores them
    assert re.search('1 of 3 label maps .*7, 254', warning)


def test_forgotten_reduce_zero_label(root):
    for i in range(3):
        write_labels(root, i, [0, 1, 2, 3])
    refuse(root, r'has 3\. If label 0 is no class .* set train_dataloader\.dataset\.reduce_zero_label=True\.')
    summary = check(root, reduce_zero_label=True)
    assert summary.warnings == []
    assert set(summary.objects) == {0, 1, 2}


def test_needless_reduce_zero_label(root):
    (warning,) = check(root, reduce_zero_label=True).warnings
    assert 'ignores label 0 of the files, and no pixel of 3 label maps has label 3' in warning
    assert warning.endswith('set reduce_zero_label=False.')


def test_different_reduce_zero_label_of_the_pipeline(root):
    dataset = build(root)
    dataset.pipeline.transforms[1].reduce_zero_label = True
    with pytest.raises(ConfigError, match='reduce_zero_label'):
        summarize('train_dataloader.dataset', dataset, training=True)


def test_missing_maps(root):
    (root / 'labels/1.png').unlink()
    refuse(root, r'1 of 3 label maps are missing: /.*labels/1\.png\. Restore')
    (root / 'labels/0.png').rename(root / 'labels/0_gt.png')
    refuse(root, r'2 of 3 label maps are missing: .*0\.png.* \(found 0_gt\.png; set seg_map_suffix\)')
    refuse(root, '2 of 3 label maps are missing', key='val_dataloader.dataset')


def test_missing_maps_of_images_without_labels(root):
    (root / 'labels/1.png').unlink()
    assert check(root, key='test_dataloader.dataset', pipeline=['LoadImageFromFile', 'PackSegInputs']).warnings == []


@pytest.mark.parametrize(
    ('size', 'dtype', 'problem'),
    [
        ((HEIGHT, WIDTH, 3), np.uint8, r'several channels \(mode RGB\)'),
        ((HEIGHT, WIDTH, 4), np.uint8, r'several channels \(mode RGBA\)'),
        ((HEIGHT, WIDTH), np.uint16, r'more than 8 bits \(mode I'),
    ],
)
def test_other_files_than_indices(root, size, dtype, problem):
    write_labels(root, 2, [0, 1], size, dtype)
    refuse(root, rf'2\.png has {problem}.*one channel of 8 bits with the index of the class of each pixel')


def test_damaged_map(root):
    (root / 'labels/2.png').write_bytes(b'text')
    refuse(root, r'2\.png is not an image, or is damaged')


def test_maps_of_another_size(root):
    write_labels(root, 1, [0, 1], (HEIGHT, HEIGHT))
    refuse(root, r'1\.png has 20×20 pixels .* its image has 30×20')


def test_smaller_maps_of_the_same_shape(root):
    """Resize of a training pipeline makes both equal, but tests compare with the original."""
    write_labels(root, 1, [0, 1], (HEIGHT // 2, WIDTH // 2))
    (warning,) = check(root).warnings
    assert 'has 15×10 pixels' in warning
    refuse(root, 'has 15×10 pixels', key='val_dataloader.dataset')


@TRANSFORMS.register_module()
class OwnStep(dict):
    """A step of a user, who may change labels and sizes in it."""

    def __call__(self, results):
        return results


def test_own_steps_may_change_labels_and_sizes(root):
    write_labels(root, 0, [0, 7])
    write_labels(root, 1, [0, 1], (HEIGHT, HEIGHT))
    steps = ['LoadImageFromFile', 'LoadAnnotations', 'mmengine.OwnStep', 'PackSegInputs']
    warnings = check(root, pipeline=steps).warnings
    assert any('has 7' in text for text in warnings)
    assert any('has 20×20 pixels' in text for text in warnings)


def test_ignored_label_of_the_dataset(root):
    write_labels(root, 1, [0, 7])
    refuse(root, r'and 255 to ignore a pixel\): .*1\.png has 7\.')
    for i in range(3):
        write_labels(root, i, [0, 7])
    summary = check(root, ignore_index=7)
    assert not summary.warnings
    assert [*summary.objects] == [0]


def test_images_larger_than_the_padded_size():
    cfg = Config(dict(default_scope='mmseg', model=dict(data_preprocessor=dict(size=(8, 16)))))
    preprocessor = MODELS.build(dict(type='mmseg.SegDataPreProcessor', size=(8, 16)))
    images = [torch.zeros(3, 8, 16), torch.zeros(3, 12, 4)]
    with pytest.raises(RuntimeError) as error:
        preprocessor(dict(inputs=images, data_samples=[SegDataSample(), SegDataSample()]), training=True)
    text = explain(error.value, cfg)
    assert text.startswith('model.data_preprocessor.size=(8, 16), ')
    assert 'up to 12×16 pixels' in text
    assert 'Set size=(12, 16) or more' in text


def test_rotated_photos(root):
    """OpenCV rotates by EXIF data, which swaps height and width."""
    exif = Image.Exif()
    exif[274] = 6
    Image.new('RGB', (HEIGHT, WIDTH)).save(root / 'images/1.jpg', exif=exif)
    assert check(root).warnings == []
    assert build(root).prepare_data(1)['inputs'].shape == (3, HEIGHT, WIDTH)


def test_no_images(root):
    cfg = dict(type='BaseSegDataset', data_root=str(root), data_prefix=dict(img_path='images'), img_suffix='.png')
    cfg = Config(dict(default_scope='mmseg', train_dataloader=dict(dataset=cfg)))
    key = 'train_dataloader.dataset'
    expected = f'no file in {root}/images ends in .png. Correct data_prefix.img_path and img_suffix of {key}.'
    assert explain_dataset_error(cfg) == f'{key}: {expected}'


def test_subset_of_known_classes(root):
    """MMSegmentation maps labels of other classes of ADE20K to 255."""
    write_labels(root, 1, [1, 2, 150])
    summary = check(root, kind='ADE20KDataset', metainfo=dict(classes=('wall', 'building')))
    assert summary.warnings == []


def test_other_training_data_is_not_affected(root):
    """A dataset without objects is an error for detectors, but not for label maps that ignore all pixels."""
    for i in range(3):
        write_labels(root, i, [255])
    (summary,) = summarize_all({'train_dataloader.dataset': build(root)})
    assert not summary.objects


@pytest.mark.parametrize(
    ('head', 'message'),
    [
        (
            dict(type='FPNHead', in_channels=[8, 16, 32, 64], in_index=[0, 1, 2, 3], feature_strides=[4, 8, 16, 32]),
            r'in_channels=\[8, 16, 32, 64\] and in_index=\[0, 1, 2, 3\] do not match the 3 maps of model\.backbone, '
            r'with \[128, 192, 320\] channels\. Set in_channels=\[128, 192, 320\] and in_index=\[0, 1, 2\]\.',
        ),
        (dict(type='FCNHead', in_channels=64, in_index=3), r'Set in_channels=320 and in_index=2, for example\.'),
        (dict(type='FCNHead', in_channels=192, in_index=2), r'in_channels=192 and in_index=2 do not match the 3 maps'),
        (dict(type='FCNHead', in_channels=320, in_index=2), None),
    ],
)
def test_channels_unlike_the_maps(head, message):
    cfg = dict(
        type='EncoderDecoder',
        backbone=dict(type='mmevm.EfficientViM', arch='m1'),
        decode_head=dict(channels=4, num_classes=3, **head),
        test_cfg=dict(mode='whole'),
    )
    init_default_scope('mmseg')
    model = MODELS.build(cfg)
    with FeatureTracer(model, cfg) as tracer, contextlib.suppress(RuntimeError, IndexError, AssertionError):
        model.encode_decode(torch.zeros(2, 3, 64, 64), [dict(img_shape=(64, 64))])
    explanation = tracer.explain()
    assert explanation is None if message is None else re.search(message, explanation)
    assert 'forward' not in vars(model.decode_head)
    assert tracer.called[-1].key == 'model.decode_head'


def test_classes_unlike_the_head(root):
    from mmseg.models.decode_heads import FCNHead
    from torch import nn

    model = nn.Module()
    model.decode_head = FCNHead(in_channels=4, channels=4, num_classes=5)
    model.auxiliary_head = nn.ModuleList([FCNHead(in_channels=4, channels=4, num_classes=2)])
    first, second = compare_class_counts(model, build(root), 'train_dataloader.dataset')
    assert first == (
        'model.decode_head.num_classes=5, but train_dataloader.dataset has 3 classes; 2 outputs will never be trained.'
    )
    assert second.startswith('model.auxiliary_head.0.num_classes=2, but train_dataloader.dataset has 3 classes')
