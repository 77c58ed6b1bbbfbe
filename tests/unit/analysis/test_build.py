"""Models of configs without weights, and the sizes of their test images."""

from pathlib import Path

import pytest
from mmengine.config import Config

from mmevm.analysis import build_without_weights, default_input_size, measure_complexity, padded_size
from mmevm.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / 'configs'


def test_models_are_built_without_reading_weights():
    nowhere = '/nowhere/weights.pth'
    backbone = dict(type='TIMMBackbone', model_name='resnet18', checkpoint_path=nowhere)
    model = dict(
        type='ImageClassifier',
        backbone=dict(backbone, init_cfg=[dict(type='Pretrained', checkpoint=nowhere)]),
        init_cfg=dict(type='Pretrained', checkpoint=nowhere),
    )
    cfg = Config(dict(model=model, default_scope='mmpretrain'))
    built = build_without_weights(cfg)
    built.init_weights()
    assert measure_complexity(built, (1, 3, 32, 32)).params == 11_176_512  # ResNet-18 without its classifier
    assert cfg.model.backbone.checkpoint_path == nowhere


def test_a_config_without_a_model_is_refused():
    with pytest.raises(ConfigError, match='no `model`'):
        build_without_weights(Config(dict(default_scope='mmdet')))


SIZES = {
    'crop': ([dict(type='ResizeEdge', scale=320), dict(type='CenterCrop', crop_size=288)], (288, 288)),
    'rectangular crop': ([dict(type='CenterCrop', crop_size=(96, 64))], (64, 96)),  # width first, as in mmcv
    'fixed': ([dict(type='mmdet.Resize', scale=(300, 200), keep_ratio=False)], (200, 300)),
    'keep ratio, square': ([dict(type='Resize', scale=512, keep_ratio=True)], (512, 512)),
    'keep ratio': ([dict(type='Resize', scale=(480, 640), keep_ratio=True)], (480, 640)),
    'keep ratio, usual scale': ([dict(type='Resize', scale=(1333, 800), keep_ratio=True)], (800, 1280)),
    'padded': ([dict(type='Resize', scale=(512, 512), keep_ratio=True), dict(type='Pad', size=(640, 384))], (384, 640)),
    'unknown': ([dict(type='LoadImageFromFile'), dict(type='Pad', size_divisor=32)], None),
}


@pytest.mark.parametrize('wrapped', [False, True])
@pytest.mark.parametrize('case', SIZES)
def test_input_size_is_that_of_the_test_pipeline(case, wrapped):
    pipeline, size = SIZES[case]
    dataset = dict(type='CocoDataset', pipeline=pipeline)
    dataset = dict(type='RepeatDataset', times=1, dataset=dataset) if wrapped else dataset
    for scope, usual in [('mmdet', (800, 1280)), ('mmpretrain', (224, 224))]:
        cfg = Config(dict(default_scope=scope, test_dataloader=dict(dataset=dataset)))
        assert default_input_size(cfg)[0] == (size or usual)


def test_input_size_without_a_test_pipeline_is_the_usual_one():
    assert default_input_size(Config(dict(default_scope='mmdet')))[0] == (800, 1280)
    assert default_input_size(Config())[0] == (224, 224)


def test_padded_size_is_that_of_the_data_preprocessor():
    model = build_without_weights(Config.fromfile(CONFIGS / 'retinanet_evm_m1.py'))
    assert padded_size(model, (65, 96)) == (96, 96)
    assert padded_size(model.backbone, (65, 96)) == (65, 96)
