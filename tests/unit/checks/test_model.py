"""Trace feature maps between small stand-ins for a backbone, a neck and heads."""

import pytest
import torch
from torch import nn

from mmevm.checks.model import FeatureTracer


class Layer(nn.Module):
    """Return feature maps of given shapes. A head has anchors of given strides."""

    def __init__(self, *shapes, strides=None):
        super().__init__()
        self.shapes = shapes
        if strides:
            self.prior_generator = nn.Module()
            self.prior_generator.strides = strides

    def forward(self, *maps):
        return [torch.zeros(shape) for shape in self.shapes]


MAPS = [(2, 8, 12, 12), (2, 8, 6, 6)]


def trace(**parts):
    """Pass two images of 96 pixels through the parts, one after the other."""
    model = nn.ModuleDict(parts)
    with FeatureTracer(model, {name: dict(type='x') for name in parts}) as tracer:
        maps = torch.zeros(2, 3, 96, 96)
        for part in model.values():
            maps = part(maps)
    return tracer


def test_resizing_in_the_preprocessor():
    """The size of the input is that of the backbone's input."""
    preprocessor = nn.ModuleList([Layer()])
    model = nn.ModuleDict(dict(data_preprocessor=preprocessor, backbone=Layer((2, 8, 6, 6))))
    cfg = dict(data_preprocessor=[dict(type='x')], backbone=dict(type='x'))
    with FeatureTracer(model, cfg) as tracer:
        preprocessor[0](torch.zeros(2, 3, 40, 40))
        model.backbone(torch.zeros(2, 3, 96, 96))
    assert list(tracer.table()) == ['model.backbone (Layer) returns 8 channels at stride 16']


def test_queries_are_not_feature_maps():
    tracer = trace(backbone=Layer((2, 8, 6, 6)), decoder=Layer((6, 2, 100, 256)), bbox_head=Layer((6, 2, 100, 4)))
    assert len(list(tracer.table())) == 1


def test_strides_of_anchors():
    assert list(trace(backbone=Layer(*MAPS), bbox_head=Layer(strides=[8, 16])).warnings()) == []
    (message,) = trace(backbone=Layer(*MAPS), bbox_head=Layer(strides=[4, 8])).warnings()
    assert message.startswith(
        'model.bbox_head has anchors or points for strides [4, 8], but model.backbone has strides'
    )


def test_strides_of_anchors_of_a_coarser_level():
    """As with a plain FPN on maps that leave out a stride."""
    maps = [(2, 8, 24, 24), (2, 8, 12, 12), (2, 8, 6, 6), (2, 8, 3, 3)]
    assert list(trace(backbone=Layer(*maps), bbox_head=Layer(strides=[4, 8, 16, 64])).warnings()) == []  # too small
    (message,) = trace(backbone=Layer(*maps), bbox_head=Layer(strides=[4, 8, 32, 64])).warnings()
    assert 'strides [4, 8, 32, 64], but model.backbone has strides [4, 8, 16, 32]' in message


@pytest.mark.parametrize(
    ('stride', 'start_level', 'fix'),
    [
        (16, 0, "model.neck=dict(_delete_=True, type='mmevm.UpsampleFPN', in_channels=[8], num_upsamples=2)"),
        (16, 1, "model.neck=dict(_delete_=True, type='mmevm.UpsampleFPN', in_channels=[8], num_upsamples=1)"),
        (8, 0, "model.neck=dict(_delete_=True, type='mmevm.UpsampleFPN', in_channels=[8], num_upsamples=1)"),
        (8, 1, "model.neck=dict(_delete_=True, type='mmevm.UpsampleFPN', in_channels=[8], num_upsamples=0)"),
        (4, 0, 'Set model.neck.in_channels=[8].'),
        (4, 1, 'Set model.neck.in_channels=[8].'),
    ],
)
def test_neck_for_the_strides_of_the_backbone(stride, start_level, fix):
    """The levels of the suggested neck have the strides of a ResNet's FPN."""

    class Neck(nn.Module):
        def forward(self, maps):
            raise RuntimeError('expected 9 channels')

    model = nn.ModuleDict(dict(backbone=Layer((2, 8, 96 // stride, 96 // stride)), neck=Neck()))
    cfg = dict(backbone=dict(type='x'), neck=dict(type='FPN', in_channels=[9], start_level=start_level))
    tracer = FeatureTracer(model, cfg)
    with pytest.raises(RuntimeError), tracer:
        model.neck(model.backbone(torch.zeros(2, 3, 96, 96)))
    assert tracer.explain().endswith(fix if fix.startswith('Set') else f'Replace the neck: {fix}.')


def test_points_for_one_of_several_maps():
    """As in the mask head of CondInst."""
    tracer = trace(backbone=Layer(*MAPS), mask_head=Layer(strides=[8]))
    assert list(tracer.warnings()) == []
    assert tracer.explain() is None


@pytest.mark.parametrize('wanted', [[8, 16], [16, 8]])
def test_channels_in_another_order(wanted):
    """As in the neck of YOLOv3. An error in it has another cause."""

    class Neck(nn.Module):
        def forward(self, maps):
            raise RuntimeError('Sizes of tensors must match')

    model = nn.ModuleDict(dict(neck=Neck()))
    tracer = FeatureTracer(model, dict(neck=dict(type='x', in_channels=wanted)))
    with pytest.raises(RuntimeError), tracer:
        model.neck([torch.zeros(2, 8, 12, 12), torch.zeros(2, 16, 6, 6)])
    assert tracer.explain() is None
