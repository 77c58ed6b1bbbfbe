import pytest
import torch
import torch.nn.functional as F
from mmdet.models.necks import FPN
from randomize import randomize
from torch import nn

from mmevm.models import UpsampleFPN

CHANNELS = [12, 16, 20]


def make_maps(height=12, width=20, batch=2):
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(batch, c, -(-height // s), -(-width // s), generator=generator, dtype=torch.double)
        for c, s in zip(CHANNELS, (1, 2, 4), strict=True)
    )


def make_neck(**kwargs):
    torch.manual_seed(0)
    neck = UpsampleFPN(CHANNELS, 8, **kwargs)
    neck.init_weights()
    return randomize(neck).double().eval()


def by_formula(weights, maps, num_upsamples, extra):
    """The authors' neck from plain functions and a state dict."""

    def conv(name, x, **kwargs):
        return F.conv2d(x, weights[f'{name}.conv.weight'], weights[f'{name}.conv.bias'], **kwargs)

    normed = []
    for i, x in enumerate(maps):
        mean = x.mean(1, keepdim=True)
        variance = ((x - mean) ** 2).mean(1, keepdim=True)
        weight, bias = (weights[f'pre_norms.{i}.{kind}'].view(1, -1, 1, 1) for kind in ('weight', 'bias'))
        normed.append((x - mean) / (variance + 1e-5).sqrt() * weight + bias)
    laterals = [conv(f'lateral_convs.{i}', x) for i, x in enumerate(normed)]
    for i in (1, 0):
        height, width = laterals[i].shape[-2:]
        rows = torch.arange(height) * laterals[i + 1].shape[2] // height
        columns = torch.arange(width) * laterals[i + 1].shape[3] // width
        laterals[i] = laterals[i] + laterals[i + 1][:, :, rows][:, :, :, columns]
    levels = [conv(f'fpn_convs.{i}', x, padding=1) for i, x in enumerate(laterals)]
    x = laterals[0]
    for i in range(num_upsamples):
        name = f'upsample_convs.{i}.conv'
        x = F.conv_transpose2d(x, weights[f'{name}.weight'], weights[f'{name}.bias'], stride=2)
        levels.insert(0, conv(f'upsample_fpn_convs.{i}', x, padding=1))
    if extra:
        levels.append(conv('fpn_convs.3', normed[-1], stride=2, padding=1))
    return levels


@pytest.mark.parametrize('size', [(12, 20), (13, 9), (2, 3)])
@pytest.mark.parametrize(
    ('kwargs', 'extra'),
    [
        (dict(num_outs=5, num_upsamples=2), False),  # as for Mask R-CNN
        (dict(num_outs=5, num_upsamples=1, add_extra_convs='on_input'), True),  # as for RetinaNet
    ],
)
def test_agrees_with_its_formula(size, kwargs, extra):
    neck, maps = make_neck(**kwargs), make_maps(*size)
    expected = by_formula(neck.state_dict(), maps, kwargs['num_upsamples'], extra)
    torch.testing.assert_close(list(neck(maps)), expected)


@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize('add_extra_convs', [False, True, 'on_input', 'on_lateral', 'on_output'])
@pytest.mark.parametrize('num_outs', [3, 4, 5])
@pytest.mark.parametrize('norm', [None, dict(type='BN')])
def test_without_pre_norms_and_finer_levels_equals_fpn(relu, add_extra_convs, num_outs, norm):
    assert_equals_the_stock_fpn(
        num_outs=num_outs, add_extra_convs=add_extra_convs, relu_before_extra_convs=relu, norm_cfg=norm
    )


def assert_equals_the_stock_fpn(**kwargs):
    neck = make_neck(num_upsamples=0, **kwargs)
    neck.pre_norms = nn.ModuleList(nn.Identity() for _ in CHANNELS)
    stock = FPN(CHANNELS, 8, **kwargs).double().eval()
    stock.load_state_dict(neck.state_dict())
    maps = make_maps(13, 21)
    torch.testing.assert_close(neck(maps), stock(maps), rtol=0, atol=0)


def test_norms_and_activations_equal_those_of_fpn():
    norm, act = dict(type='BN'), dict(type='ReLU')
    assert_equals_the_stock_fpn(num_outs=4, add_extra_convs='on_output', norm_cfg=norm, act_cfg=act)


def test_finer_levels_have_the_norm_and_activation_of_the_others():
    neck = make_neck(num_outs=5, norm_cfg=dict(type='BN'), act_cfg=dict(type='ReLU'))
    state = neck.state_dict()
    levels = neck(make_maps())
    assert all((level >= 0).all() and level.any() for level in levels)
    plain = make_neck(num_outs=5, norm_cfg=dict(type='BN'))
    plain.load_state_dict(state)
    for name in ('upsample_fpn_convs.0', 'upsample_fpn_convs.1'):
        assert f'{name}.bn.weight' in state
    assert any((level < 0).any() for level in plain(make_maps())[:2])
    assert 'upsample_convs.0.bn.weight' not in state


def test_coarser_levels_are_pooled_by_default():
    assert len(make_neck(num_outs=6).fpn_convs) == len(CHANNELS)
    kwargs = dict(num_outs=7, num_upsamples=1, add_extra_convs='on_output')
    neck, rectified = make_neck(**kwargs), make_neck(relu_before_extra_convs=True, **kwargs)
    rectified.load_state_dict(neck.state_dict())
    last, other = neck(make_maps(64, 64))[-1], rectified(make_maps(64, 64))[-1]
    assert not torch.allclose(last, other)
    torch.testing.assert_close(last, neck.fpn_convs[5](neck.fpn_convs[4](neck(make_maps(64, 64))[4])))


def test_strides_of_mask_rcnn_and_retinanet():
    maps = make_maps(16, 16)  # stride 16 of a 256² image
    for kwargs, strides in [
        (dict(num_outs=5, num_upsamples=2), (4, 8, 16, 32, 64)),
        (dict(num_outs=5, num_upsamples=1, add_extra_convs='on_input'), (8, 16, 32, 64, 128)),
        (dict(num_outs=3, num_upsamples=0), (16, 32, 64)),
    ]:
        levels = make_neck(**kwargs)(maps)
        assert [level.shape for level in levels] == [(2, 8, 256 // s, 256 // s) for s in strides]


def test_every_parameter_gets_a_gradient():
    neck = make_neck(num_outs=6, num_upsamples=2, add_extra_convs='on_input', norm_cfg=dict(type='BN')).train()
    sum((level * torch.randn_like(level)).sum() for level in neck(make_maps(16, 16))).backward()
    for name, parameter in neck.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_initial_weights_are_those_of_fpn():
    neck = UpsampleFPN(CHANNELS, 256, num_outs=5)
    neck.init_weights()
    weight = neck.fpn_convs[0].conv.weight
    bound = (6 / (2 * 256 * 9)) ** 0.5  # Xavier, uniform
    assert 0.98 * bound < weight.abs().max() <= bound
    assert not neck.fpn_convs[0].conv.bias.any()
    assert neck.upsample_convs[0].conv.bias is not None


def test_too_few_levels_raise():
    with pytest.raises(ValueError, match=r'num_outs=4.*num_upsamples=2.*3 maps'):
        UpsampleFPN(CHANNELS, 8, num_outs=4)


@pytest.mark.parametrize('maps', [make_maps()[:2], make_maps()[::-1]])
def test_maps_with_other_channels_raise(maps):
    with pytest.raises(ValueError, match=r'^in_channels=\[12, 16, 20\] of the neck .* Set in_channels=\[.*\]\.$'):
        make_neck(num_outs=5)(maps)
