"""A whole classifier or detector in its deploy form gives what it gave before."""

import copy
from itertools import chain

import pytest
import torch
from command_line import ROOT
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from randomise import randomise
from torch.nn.modules.batchnorm import _BatchNorm

from mmevm.complexity import build_without_weights
from mmevm.deploy import deploy

RTMDET = """
_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
model = dict(
    backbone=dict(_delete_=True, type='mmevm.EfficientViM', arch='m1', out_indices=(0, 1)),
    neck=dict(
        _delete_=True, type='mmevm.UpsampleFPN', in_channels=[128, 192], out_channels=96, num_outs=3, num_upsamples=1
    ),
)
"""


@pytest.mark.parametrize('distilled', [False, True])
def test_a_classifier(distilled):
    init_default_scope('mmpretrain')
    backbone = dict(type='mmevm.EfficientViM', arch='m1', out_indices=(2,), out_hidden_states=True)
    head = dict(type='mmevm.FusionClsHead', num_classes=10, in_channels=[128, 192, 320, 320], distilled=distilled)
    model = randomise(MODELS.build(dict(type='mmevm.TaughtImageClassifier', backbone=backbone, head=head))).eval()
    x = torch.randn(2, 3, 70, 90)
    with torch.no_grad():
        expected = model(x)
        out = deploy(copy.deepcopy(model))(x)
    assert (out - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize('name', ['maskrcnn', 'retinanet', 'rtmdet'])
def test_a_detector(name, tmp_path):
    """RTMDet's heads share convolutions among levels, whose BatchNorms are different ones."""
    path = ROOT / f'configs/{name}_evm_m1.py'
    if name == 'rtmdet':
        path = tmp_path / 'rtmdet.py'
        path.write_text(RTMDET)
    model = randomise(build_without_weights(Config.fromfile(path))).eval()
    head = model.rpn_head if name == 'maskrcnn' else model.bbox_head
    x = torch.randn(1, 3, 128, 96)
    with torch.no_grad():
        expected = head(model.extract_feat(x))
        deploy(model)
        outs = head(model.extract_feat(x))
    for out, ref in zip(chain(*outs), chain(*expected), strict=True):
        assert (out - ref).abs().max() < 1e-4 * ref.abs().max()
    assert not [m for m in model.backbone.modules() if isinstance(m, _BatchNorm)]
    assert not any(m.training for m in model.modules())
