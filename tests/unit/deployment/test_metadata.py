"""Metadata of exported files."""

import json

import pytest
from command_line import ROOT
from mmengine.config import Config

from mmevm.deployment.metadata import check_pipeline, describe_preprocessing, read_metadata
from mmevm.errors import ConfigError

IMAGENET = dict(
    image_mean='[123.675, 116.28, 103.53]', image_std='[58.395, 57.12, 57.375]', channel_order='RGB', pad_value='0'
)
CV2 = dict(interpolation='bilinear', backend='cv2')
PAD = dict(size_divisor=None, pad_to_square=False)


@pytest.mark.parametrize(
    ('config', 'divisor', 'pipeline'),
    [
        ('retinanet_evm_m1.py', '32', [dict(type='Resize', scale=[1333, 800], keep_ratio=True, **CV2)]),
        (
            'rtmdet/rtmdet_evm_m1.py',
            '32',
            [
                dict(type='Resize', scale=[640, 640], keep_ratio=True, **CV2),
                dict(type='Pad', size=[640, 640], pad_val=[114, 114, 114], **PAD),
            ],
        ),
        (
            'classification/efficientvim-m1_300e_in1k.py',
            '1',
            [
                dict(type='ResizeEdge', scale=256, edge='short', interpolation='bicubic', backend='pillow'),
                dict(type='CenterCrop', crop_size=[224, 224]),
            ],
        ),
    ],
)
def test_preprocessing_of_configs(config, divisor, pipeline):
    described = describe_preprocessing(Config.fromfile(ROOT / 'configs' / config))
    assert json.loads(described.pop('pipeline')) == pipeline
    assert described == dict(IMAGENET, pad_size_divisor=divisor)


def test_preprocessing_without_settings():
    plain = Config(dict(model=dict(backbone=dict(in_channels=1))))
    nothing = dict(image_mean='[0.0]', image_std='[1.0]', channel_order='BGR', pad_size_divisor='1', pad_value='0')
    assert describe_preprocessing(plain) == nothing


@pytest.mark.parametrize('step', [dict(type='CLAHE'), dict(type='Resize', scale_factor=0.5), dict(type='TestTimeAug')])
def test_other_steps_are_not_described(step):
    cfg = Config.fromfile(ROOT / 'configs/retinanet_evm_m1.py')
    cfg.test_dataloader.dataset.pipeline.insert(1, step)
    assert 'pipeline' not in describe_preprocessing(cfg)


def test_all_segmentation_configs_are_described():
    paths = sorted((ROOT / 'configs/segmentation').glob('*.py'))
    assert len(paths) > 5
    for path in paths:
        steps = json.loads(describe_preprocessing(Config.fromfile(path))['pipeline'])
        assert [step['type'] for step in steps] in (['Resize'], ['Resize', 'ResizeToMultiple']), path


def test_dataset_wrappers_are_unwrapped():
    cfg = Config.fromfile(ROOT / 'configs/retinanet_evm_m1.py')
    expected = describe_preprocessing(cfg)
    cfg.test_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=cfg.test_dataloader.dataset)
    assert describe_preprocessing(cfg) == expected
    assert 'pipeline' in expected


def test_missing_pipeline_is_explained():
    check_pipeline(dict(pipeline=[]), 'a.onnx')
    with pytest.raises(ConfigError, match=r'a\.onnx: pipeline is missing in its metadata'):
        check_pipeline({}, 'a.onnx')


def test_read_metadata():
    entries = dict(IMAGENET, mmevm_version='0.1.0', task='detection', pipeline='[]', score_threshold='0.05', config='1')
    read = read_metadata(entries, 'a.onnx')
    assert (read['image_mean'], read['score_threshold'], read['config']) == ([123.675, 116.28, 103.53], 0.05, '1')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(mmevm_version=None), 'no metadata of mmevm'),
        (dict(task=None), "part='neck', expected .* --part detections"),
        (dict(image_mean='[1'), 'its metadata is damaged'),
    ],
)
def test_unusable_metadata(change, message):
    entries = dict(mmevm_version='0.1.0', task='detection', pipeline='[]', part='neck', image_mean='[]') | change
    with pytest.raises(ConfigError, match=f'a.onnx: .*{message}'):
        read_metadata({key: value for key, value in entries.items() if value is not None}, 'a.onnx')
