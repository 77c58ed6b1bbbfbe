"""The exportable parts of a model, the names of their outputs, and the preprocessing they expect."""

import pytest
from command_line import ROOT
from mmengine.config import Config
from torch import nn

from mmevm.analysis import build_without_weights
from mmevm.deployment.model_part import ModelPart, preprocessing
from mmevm.errors import ConfigError
from mmevm.models import EfficientViM

CLASSIFIER = ROOT / 'configs' / 'classification' / 'efficientvim-m1_300e_in1k.py'
RETINANET = ROOT / 'configs' / 'retinanet_evm_m1.py'


def test_default_part_and_output_names():
    retinanet = build_without_weights(Config.fromfile(RETINANET)).eval()
    assert ModelPart(retinanet).part == 'neck'
    pyramid = ['stride8', 'stride16', 'stride32', 'stride64', 'stride128']
    assert ModelPart(retinanet).output_names() == pyramid
    assert ModelPart(retinanet, 'backbone').output_names() == ['stride16', 'stride32', 'stride64']
    heads = [f'{what}_{level}' for what in ('cls_scores', 'bbox_preds') for level in pyramid]
    assert ModelPart(retinanet, 'model').output_names() == heads
    classifier = build_without_weights(Config.fromfile(CLASSIFIER)).eval()
    assert ModelPart(classifier).part == 'model'
    assert ModelPart(classifier).output_names() == ['logits']
    stem = nn.ModuleDict(dict(backbone=EfficientViM('m1', out_strides=(4, 8, 16)).eval()))
    assert ModelPart(stem, 'backbone').output_names() == ['stride4', 'stride8', 'stride16']
    states = [f'hidden_states_{i}' for i in range(3)]
    assert ModelPart(classifier, 'backbone').output_names() == [*states, 'stride64']


def test_missing_part_raises():
    classifier = build_without_weights(Config.fromfile(CLASSIFIER))
    with pytest.raises(ConfigError, match='neck is for detectors'):
        ModelPart(classifier, 'neck')
    with pytest.raises(ConfigError, match='has no backbone'):
        ModelPart(nn.Identity(), 'backbone')
    with pytest.raises(ConfigError, match='detections is for detectors'):
        ModelPart(classifier, 'detections')
    with pytest.raises(ConfigError, match=r'choose from backbone, neck, model, detections'):
        ModelPart(classifier, 'head')
    mask_rcnn = build_without_weights(Config.fromfile(ROOT / 'configs/maskrcnn_evm_m1.py'))
    for part in ('model', 'detections'):
        with pytest.raises(ConfigError, match=rf'part {part} .* not for a MaskRCNN.*choose neck'):
            ModelPart(mask_rcnn, part)


def test_preprocessing_of_both_libraries():
    imagenet = dict(image_mean='[123.675, 116.28, 103.53]', image_std='[58.395, 57.12, 57.375]', channel_order='RGB')
    assert preprocessing(Config.fromfile(RETINANET)) == dict(imagenet, pad_size_divisor='32')
    assert preprocessing(Config.fromfile(CLASSIFIER)) == dict(imagenet, pad_size_divisor='1')
    plain = Config(dict(model=dict(backbone=dict(in_channels=1))))
    nothing = dict(image_mean='[0.0]', image_std='[1.0]', channel_order='BGR', pad_size_divisor='1')
    assert preprocessing(plain) == nothing
