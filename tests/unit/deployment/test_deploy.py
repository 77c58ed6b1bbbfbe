"""A classifier or detector in deploy mode returns the same outputs as before."""

import copy
from itertools import chain

import pytest
import torch
import torch.nn.utils.parametrizations as P
from command_line import ROOT
from mmcv.cnn import ConvModule
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from randomize import randomize
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from versions import needs_half

from mmevm.analysis import build_without_weights
from mmevm.deployment import deploy

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
def test_deployed_classifier_returns_the_same(distilled):
    init_default_scope('mmpretrain')
    backbone = dict(type='mmevm.EfficientViM', arch='m1', out_indices=(2,), out_hidden_states=True)
    head = dict(type='mmevm.FusionClsHead', num_classes=10, in_channels=[128, 192, 320, 320], distilled=distilled)
    model = randomize(MODELS.build(dict(type='mmevm.DistillationClassifier', backbone=backbone, head=head))).eval()
    x = torch.randn(2, 3, 70, 90)
    with torch.no_grad():
        expected = model(x)
        out = deploy(copy.deepcopy(model))(x)
    assert (out - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize('name', ['maskrcnn', 'retinanet', 'rtmdet'])
def test_deployed_detector_returns_the_same(name, tmp_path):
    """The heads of RTMDet share convolutions between levels, each with its own BatchNorm."""
    path = ROOT / f'configs/{name}_evm_m1.py'
    if name == 'rtmdet':
        path = tmp_path / 'rtmdet.py'
        path.write_text(RTMDET)
    model = randomize(build_without_weights(Config.fromfile(path))).eval()
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


BN = dict(type='BN')


def conv_module(norm_cfg=BN, **settings):
    layer = randomize(ConvModule(4, 6, 3, padding=1, norm_cfg=norm_cfg, **settings))
    if layer.norm.running_mean is not None:
        nn.init.normal_(layer.norm.running_mean)
        nn.init.uniform_(layer.norm.running_var, 0.5, 2)
    return layer


def changed(change, module='conv'):
    layer = conv_module()
    change(getattr(layer, module))
    return layer


def shared():
    layers = nn.Sequential(conv_module(), conv_module(), nn.Conv2d(6, 4, 1), conv_module())
    layers[3].conv = layers[0].conv
    return nn.Sequential(layers[0], layers[2], layers[3])


def shared_with_another_kind():
    layer = conv_module()
    return nn.Sequential(layer, nn.Conv2d(6, 4, 1), nn.Sequential(layer.conv, nn.ReLU()))


class Residual(ConvModule):
    def forward(self, x):
        return self.conv(x) + self.norm(self.conv(x))


def residual():
    layer = conv_module()
    layer.__class__ = Residual
    return layer


LAYERS = dict(
    plain=(conv_module, True),
    bias=(lambda: conv_module(bias=True), True),
    groups=(lambda: conv_module(groups=2), True),
    padding=(lambda: conv_module(padding_mode='reflect'), True),
    no_affine=(lambda: conv_module(dict(BN, affine=False)), True),
    conv_of_mmcv=(lambda: conv_module(conv_cfg=dict(type='Conv')), True),
    activation_first=(lambda: conv_module(order=('act', 'conv', 'norm'), inplace=False), True),
    efficient=(lambda: conv_module(efficient_conv_bn_eval=True), True),
    sync_bn_reverted=(lambda: revert_sync_batchnorm(conv_module(dict(type='SyncBN'))), True),
    shared_norm=(lambda: nn.Sequential(layer := conv_module(), nn.Conv2d(6, 6, 1), layer.norm), True),
    no_statistics=(lambda: conv_module(dict(BN, track_running_stats=False)), False),
    instance_norm=(lambda: conv_module(dict(type='IN')), False),
    activation_between=(lambda: conv_module(order=('conv', 'act', 'norm')), False),
    weight_standardization=(lambda: conv_module(conv_cfg=dict(type='ConvWS')), False),
    adaptive_weight_standardization=(lambda: conv_module(conv_cfg=dict(type='ConvAWS')), False),
    switchable_atrous=(lambda: conv_module(conv_cfg=dict(type='SAC')), False),
    deformable=(lambda: conv_module(conv_cfg=dict(type='DCN')), False),
    modulated_deformable=(lambda: conv_module(conv_cfg=dict(type='DCNv2')), False),
    transposed=(lambda: conv_module(conv_cfg=dict(type='deconv')), False),
    transposed_groups=(lambda: conv_module(conv_cfg=dict(type='deconv'), groups=2), False),
    spectral_norm=(lambda: conv_module(with_spectral_norm=True), False),
    parametrized=(lambda: changed(P.weight_norm), False),
    hooked_weight=(lambda: changed(lambda conv: nn.utils.weight_norm(conv)), False),
    hooked_conv=(lambda: changed(lambda conv: conv.register_forward_hook(lambda *call: call[2] + 1)), False),
    hooked_norm=(lambda: changed(lambda norm: norm.register_forward_hook(lambda *call: call[2] + 1), 'norm'), False),
    shared_conv=(shared, False),
    conv_of_another_module=(shared_with_another_kind, False),
    another_forward=(residual, False),
)


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_conv_modules_are_folded_only_where_it_is_exact(name, dtype):
    make, folds = LAYERS[name]
    layer = make().to(dtype).eval()
    x = torch.randn(2, 4, 9, 8, dtype=dtype)
    with torch.no_grad():
        expected = layer(x)
        assert deploy(layer) is layer
        out = layer(x)
    torch.testing.assert_close(out, expected)
    folded = [isinstance(module.norm, nn.Identity) for module in layer.modules() if isinstance(module, ConvModule)]
    assert all(folded) if folds else not any(folded)


def test_sync_bn_is_folded():
    layer = conv_module(dict(type='SyncBN')).eval()
    x = torch.randn(2, 4, 9, 8)
    with torch.no_grad():
        expected = revert_sync_batchnorm(copy.deepcopy(layer))(x)
        torch.testing.assert_close(deploy(layer)(x), expected)
    assert isinstance(layer.norm, nn.Identity)


@pytest.mark.parametrize('dtype', [pytest.param(torch.float16, marks=needs_half), torch.bfloat16])
def test_folding_keeps_reduced_precision(dtype):
    layer = conv_module().eval()
    layer.norm.running_var.mul_(1e-6)  # float16 cannot represent 1e-6 + eps accurately
    layer.to(dtype)
    x = torch.randn(2, 4, 9, 8, dtype=dtype)
    with torch.no_grad():
        expected = copy.deepcopy(layer).double()(x.double())
        out = deploy(layer)(x)
    assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
    assert (out.double() - expected).abs().max() < 8 * torch.finfo(dtype).eps * expected.abs().max()


def test_convolution_used_directly_by_its_parent_is_not_folded():
    """TOOD multiplies the weight with attention weights and calls the norm itself."""
    from mmdet.models.dense_heads.tood_head import TaskDecomposition

    layer = randomize(TaskDecomposition(4, 2, norm_cfg=BN)).eval()
    x = torch.randn(1, 8, 5, 5)
    with torch.no_grad():
        expected = layer(x)
        torch.testing.assert_close(deploy(layer)(x), expected)


def test_model_deployed_in_inference_mode_can_be_changed_later():
    layer = conv_module().eval()
    with torch.inference_mode():
        deploy(layer)
    assert not any(parameter.is_inference() for parameter in layer.parameters())
    layer.to(memory_format=torch.channels_last)
    layer.conv.weight.data.mul_(2)
