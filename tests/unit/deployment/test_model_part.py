"""The exportable parts of a model, and the names and the meaning of their outputs."""

import pytest
import torch
from command_line import ROOT
from mmengine.config import Config
from tiny_models import normalize_features, shrink
from torch import nn

from mmevm.analysis import build_without_weights
from mmevm.deployment.model_part import ModelPart, image_sizes
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


def test_parts_of_two_stage_detectors():
    mask_rcnn = build_without_weights(Config.fromfile(ROOT / 'configs/maskrcnn_evm_m1.py')).eval()
    with pytest.raises(ConfigError, match=r'part model .* not for a MaskRCNN.*choose detections or neck'):
        ModelPart(mask_rcnn, 'model')
    part = ModelPart(mask_rcnn, 'detections')
    assert part.output_names() == ['dets', 'labels', 'masks']
    assert part.describe_results() == dict(
        task='instance segmentation', score_threshold='0.05', mask_threshold='0.5', mask_stride='null'
    )


def test_meaning_of_the_outputs():
    rtmdet_ins = ModelPart(
        build_without_weights(Config.fromfile(ROOT / 'configs/rtmdet/rtmdet-ins_evm_m1.py')), 'detections'
    )
    results = rtmdet_ins.describe_results()
    assert (results['task'], results['mask_threshold'], results['mask_stride']) == ('instance segmentation', '0.0', '8')
    retinanet = build_without_weights(Config.fromfile(RETINANET))
    assert ModelPart(retinanet, 'detections').describe_results() == dict(task='detection', score_threshold='0.05')
    assert ModelPart(retinanet, 'model').describe_results() == {}
    classifier = build_without_weights(Config.fromfile(CLASSIFIER))
    assert ModelPart(classifier).describe_results() == dict(task='classification')
    assert ModelPart(classifier, 'backbone').describe_results() == {}


def test_size_of_each_image_without_its_padding():
    x = torch.randn(3, 3, 6, 8)
    x[0, :, 4:] = x[0, :, :, 5:] = 0
    x[1, :, 2] = x[1, :, :, 3] = 0  # within the image
    x[2] = 0
    x[2, 1, :4, :7] = 1  # zero in the other channels only
    assert image_sizes(x, True).tolist() == [[4, 5], [6, 8], [4, 7]]
    assert image_sizes(x, False).tolist() == [[6, 8]] * 3


@pytest.mark.parametrize(
    ('mean', 'are_padding'), [([123.675, 116, 103], True), ([128, 127, 126], False), (None, False)]
)
def test_zeros_are_padding_if_no_pixel_becomes_zero(mean, are_padding):
    cfg = Config.fromfile(RETINANET)
    std = mean and [58.0, 57.0, 57.0]
    cfg.model.data_preprocessor.update(mean=mean, std=std, bgr_to_rgb=False)
    assert ModelPart(build_without_weights(cfg), 'detections').zeros_are_padding == are_padding


def saturate(weight):
    """Return the detections of a small RTMDet with the weights of its scores drawn with this standard deviation."""
    cfg = Config.fromfile(ROOT / 'configs/rtmdet/rtmdet_evm_m1.py')
    shrink(cfg.model)
    torch.manual_seed(0)
    model = build_without_weights(cfg)
    normalize_features(model)
    for layer in model.bbox_head.rtm_cls:
        torch.nn.init.normal_(layer.weight, 0, weight)
    part = ModelPart(model.eval(), 'detections')
    part.disable_score_threshold()
    return part


@torch.no_grad()
def test_contrast_is_lowered_until_scores_differ():
    noise = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(saturate(0.1).lower_contrast(noise), noise)
    part = saturate(1.0)
    lowered = part.lower_contrast(noise)
    equal = [(part(x)[0][..., 4].diff() > -1e-6).float().mean().item() for x in (noise, lowered)]
    assert lowered.std() < 0.5
    assert equal[0] > 0.2
    assert equal[1] < 0.05
    assert ModelPart(part.model, 'neck').lower_contrast(noise) is noise
