"""Model specs build the models they name, with the same random weights each time."""

import pytest
import timm
import torch
from command_line import ROOT
from timm.models import register_model
from torch import nn

from mmevm.analysis.latency import DEFAULT_MODELS, ModelSpec
from mmevm.errors import ConfigError
from mmevm.models import EfficientViM

RETINANET = str(ROOT / 'configs/retinanet_evm_m1.py')
MASK_RCNN = str(ROOT / 'configs/maskrcnn_evm_m1.py')
CLASSIFIER = str(ROOT / 'configs/classification/efficientvim-m1_300e_in1k.py')
TIMM_CLASSIFIER = """
model = dict(type='mmpretrain.TimmClassifier', model_name='resnet18', loss=dict(type='mmpretrain.CrossEntropyLoss'))
default_scope = 'mmpretrain'
"""


class WithoutFeatures(nn.Module):
    """A model in timm's style without ``features_only``."""

    def __init__(self, num_classes):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, 4)
        self.head = nn.Linear(4, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x):
        return self.stem(x)

    def forward(self, x):
        return self.head(self.forward_features(x).mean((2, 3)))


@register_model
def mmevm_test_without_features(pretrained=False, pretrained_cfg=None, num_classes=10, **kwargs):
    if 'features_only' in kwargs:
        raise TypeError('unexpected keyword argument: features_only')
    return WithoutFeatures(num_classes)


def shapes(model, size=64):
    with torch.no_grad():
        outs = model(torch.rand(1, 3, size, size))
    return [tuple(out.shape) for out in ([outs] if isinstance(outs, torch.Tensor) else outs)]


def test_builds_our_backbones():
    model = ModelSpec('m2').build()
    assert isinstance(model, EfficientViM)
    assert shapes(model) == [(1, 128, 4, 4), (1, 256, 2, 2), (1, 512, 1, 1)]
    assert not model.training


def test_builds_timm_models_with_the_maps_of_their_stages():
    model = ModelSpec('efficientvim_m1').build()
    assert shapes(model) == [(1, 128, 4, 4), (1, 192, 2, 2), (1, 320, 1, 1)]
    assert not model.training
    assert not any('head' in name for name, _ in model.named_parameters())


def test_builds_timm_models_without_feature_maps_up_to_their_head():
    assert shapes(ModelSpec('mmevm_test_without_features').build()) == [(1, 4, 16, 16)]


@pytest.mark.parametrize('name', ['m1', 'shvit_s1', RETINANET])
def test_deploy_fuses_batch_norms_without_changing_outputs(name):
    spec = ModelSpec(name)
    x = torch.rand(1, 3, 64, 64)
    deployed = spec.deploy(spec.build())
    with torch.no_grad():
        for out, ref in zip(deployed(x), spec.build()(x), strict=True):
            assert (out - ref).abs().max() < 1e-4 * ref.abs().max()
    assert not [m for m in deployed.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not deployed.training


@pytest.mark.parametrize('name', ['m1', 'shvit_s1'])
def test_trained_suffix_excludes_a_model_from_deploy_mode(name):
    spec, plain = ModelSpec(f'{name}@trained'), ModelSpec(name).build()
    model = spec.deploy(spec.build())
    assert not model.training
    assert str(model) == str(plain)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in plain.state_dict().items())


@pytest.mark.parametrize('name', ['m1', 'shvit_s1', RETINANET])
def test_weights_are_the_same_each_time_and_the_rng_does_not_advance(name):
    torch.manual_seed(5)
    first = ModelSpec(name).build().state_dict()
    after = torch.rand(3)
    torch.manual_seed(7)
    again = ModelSpec(name).build().state_dict()
    assert all(torch.equal(again[key], value) for key, value in first.items())
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), after)


def test_builds_the_backbone_or_the_whole_model_of_a_config():
    assert isinstance(ModelSpec(RETINANET).build(), EfficientViM)
    assert shapes(ModelSpec(CLASSIFIER, part='model').build()) == [(1, 1000)]
    assert ModelSpec('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py').build().depth == 50


@pytest.mark.parametrize(('name', 'outputs'), [(RETINANET, 10), (MASK_RCNN, 3)])
def test_whole_detectors_return_the_outputs_of_their_heads(name, outputs):
    """RetinaNet: scores and boxes of five levels. Mask R-CNN: scores, boxes and masks of RoIs."""
    spec = ModelSpec(name, part='model')
    assert len(shapes(spec.build(), size=128)) == outputs
    assert len(shapes(spec.deploy(spec.build()), size=128)) == outputs


@pytest.mark.parametrize(
    ('name', 'similar'), [('shvit_s44', 'shvit_s4'), ('efficientnet_bo', 'efficientnet_b0'), ('M4', 'm4')]
)
def test_similar_names_are_suggested_for_an_unknown_one(name, similar):
    with pytest.raises(ValueError, match=f'^{name} is not a model of .*similar names: .*{similar}'):
        ModelSpec(name)


def test_errors_name_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="part='neck' is not one of backbone, model"):
        ModelSpec('m1', part='neck')
    with pytest.raises(ConfigError, match='cannot be read'):
        ModelSpec(str(tmp_path / 'nowhere.py'))
    config = tmp_path / 'timm_classifier.py'
    config.write_text(TIMM_CLASSIFIER)
    with pytest.raises(ConfigError, match='has no backbone'):
        ModelSpec(str(config))
    assert shapes(ModelSpec(str(config), part='model').build()) == [(1, 1000)]
    config.write_text('a = 1')
    with pytest.raises(ConfigError, match='has no `model`'):
        ModelSpec(str(config))


def test_default_models_exist():
    assert all(ModelSpec(name).name == name for name in DEFAULT_MODELS)
    assert timm.is_model('efficientvim_m4')
    assert DEFAULT_MODELS[:2] == ('m4', 'efficientvim_m4')
