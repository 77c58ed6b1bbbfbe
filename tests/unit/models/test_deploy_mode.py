"""Deploy mode returns the outputs of the trained backbone, for random statistics, gates and weights."""

import copy

import pytest
import torch
from mmengine.model import revert_sync_batchnorm
from randomize import randomize
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from versions import needs_half

from mmevm.models import EfficientViM, efficientvim
from mmevm.models.efficientvim import Block
from mmevm.models.layers import FFN, ConvNorm, PatchMerging
from mmevm.models.packed_conv import PackedConv2d

TINY = dict(embed_dims=(16, 32, 48), depths=(1, 2, 1), state_dims=(9, 4, 4))


def deployed(model):
    model = copy.deepcopy(model)
    model.switch_to_deploy()
    return model


def tiny(**kwargs):
    return randomize(EfficientViM(TINY, **kwargs)).eval()


def assert_same(model, x, tolerance=1e-5):
    """Compare twice: the second call uses weights packed for this image size."""
    with torch.no_grad():
        form, expected = deployed(model), model(x)
        for _ in range(2):
            for out, ref in zip(form(x), expected, strict=True):
                assert out.shape == ref.shape
                assert (out - ref).abs().max() < tolerance * ref.abs().max()


@pytest.mark.parametrize('arch', ['m1', 'm2', 'm3', 'm4'])
def test_deploy_mode_returns_the_same_maps_and_hidden_states(arch):
    assert_same(randomize(EfficientViM(arch, out_hidden_states=True)).eval(), torch.randn(2, 3, 97, 131))


@pytest.mark.parametrize('size', [(1, 1), (16, 200), (33, 64), (128, 96)])
def test_deploy_mode_with_any_image_size(size):
    assert_same(tiny(), torch.randn(2, 3, *size))


@pytest.mark.parametrize(
    'arguments',
    [
        dict(out_indices=(1,)),
        dict(out_strides=(2, 4, 8, 16)),
        dict(mixer_cfg=dict(type='mmevm.HSMSSD', ssd_expand=0.5)),
        dict(mixer_cfg=dict(type='mmevm.MultiHeadHSMSSD', head_dim=16), out_hidden_states=True),
        dict(mixer_cfg=dict(type='mmevm.NCSSD', head_dim=None), out_hidden_states=True),
        dict(mixer_cfg=dict(type='mmevm.SelfAttention', head_dim=16)),
        dict(mixer_norm_cfg=dict(type='BN'), out_hidden_states=True),
        dict(norm_cfg=dict(type='BN', eps=0.1)),
        dict(norm_cfg=dict(type='SyncBN')),
        dict(in_channels=1),
    ],
    ids=str,
)
def test_deploy_mode_with_any_arguments(arguments):
    model = revert_sync_batchnorm(tiny(**arguments)).eval()  # SyncBN itself does not run on a CPU
    assert_same(model, torch.randn(2, arguments.get('in_channels', 3), 50, 70))


@pytest.mark.parametrize('alpha', [-30.0, 30.0])
def test_closed_and_open_gates(alpha):
    model = tiny()
    for stage in model.stages:
        for block in stage.blocks:
            block.alpha.data.fill_(alpha)
    assert_same(model, torch.randn(1, 3, 64, 64), tolerance=1e-4)


def test_batch_is_processed_in_chunks(monkeypatch):
    """The chunks have equal sizes where possible, as weights are packed for one size."""
    monkeypatch.setattr(efficientvim, '_MAX_TOKENS', 3 * 4 * 3)
    model = deployed(tiny(out_strides=(4, 8, 16, 32, 64), out_hidden_states=True))
    batches = {'patch_embed': [], 'stages.0': [], 'stages.0.downsample': [], 'stages.1': []}
    for name, seen in batches.items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(len(inputs[0])))
    x = torch.randn(4, 3, 64, 48)
    outs = model(x)
    assert batches == {'patch_embed': [2, 2], 'stages.0': [2, 2], 'stages.0.downsample': [2, 2], 'stages.1': [4]}
    for out, ref in zip(outs, zip(*(model(image[None]) for image in x), strict=True), strict=True):
        torch.testing.assert_close(out, torch.cat(ref))
    for seen in batches.values():
        seen.clear()
    model(torch.randn(3, 3, 128, 128))
    assert batches == {'patch_embed': [1] * 3, 'stages.0': [1] * 3, 'stages.0.downsample': [1] * 3, 'stages.1': [2, 1]}


def test_convolutions_of_maps_are_packed():
    convolutions = {name: module for name, module in deployed(tiny()).named_modules() if isinstance(module, nn.Conv2d)}
    plain = {name for name, module in convolutions.items() if not isinstance(module, PackedConv2d)}
    assert plain == {f'stages.{stage}.downsample.se.{layer}' for stage in (0, 1) for layer in ('fc1', 'fc2')}


def test_deploy_mode_with_any_memory_layout():
    model = deployed(tiny())
    x = torch.randn(2, 3, 64, 48)
    for y in (x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        torch.testing.assert_close(model(y), model(x), rtol=1e-5, atol=1e-5)


def test_second_switch_does_nothing():
    model = deployed(tiny())
    x = torch.randn(1, 3, 64, 64)
    modules, expected = list(model.modules()), model(x)
    model.switch_to_deploy()
    assert list(model.modules()) == modules
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_deploy_mode_has_no_batch_norm_and_no_A():
    model = deployed(tiny())
    assert not [m for m in model.modules() if isinstance(m, (_BatchNorm, nn.LayerNorm))]
    assert not [name for name, _ in model.named_parameters() if name.endswith('.A')]


def test_deploy_mode_cannot_be_trained():
    model = deployed(tiny().train())
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(RuntimeError, match='cannot be trained: build it with deploy=False'):
        model.train()
    model.eval()  # called by every evaluation


def test_group_norm_raises_and_changes_nothing():
    model = tiny(norm_cfg=dict(type='GN', num_groups=2))
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    with pytest.raises(ValueError, match='GroupNorm cannot be folded'):
        model.switch_to_deploy()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_weights_load_into_a_backbone_built_in_deploy_mode():
    model = deployed(tiny(out_hidden_states=True))
    built = EfficientViM(TINY, deploy=True, out_hidden_states=True)
    built.load_state_dict(model.state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(built(x), model(x), rtol=0, atol=0)


def test_autocast():
    model = tiny()
    x = torch.randn(2, 3, 96, 64)
    with torch.no_grad(), torch.autocast('cpu', dtype=torch.bfloat16):
        outs, expected = deployed(model)(x), model(x)
    exact = model(x)
    for out, other, ref in zip(outs, expected, exact, strict=True):
        assert (out - ref).abs().max() < 2 * (other - ref).abs().max() + 0.01 * ref.abs().max()


MIXERS = [None, dict(type='mmevm.NCSSD', head_dim=None)]


@pytest.mark.parametrize('mixer_cfg', MIXERS, ids=str)
@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, pytest.param(torch.float16, marks=needs_half)])
def test_every_layer_keeps_its_dtype(dtype, mixer_cfg):
    model = tiny(mixer_cfg=mixer_cfg, out_hidden_states=True).to(dtype)
    x = torch.randn(2, 3, 96, 64, dtype=dtype)
    with torch.no_grad():
        form, exact = deployed(model), copy.deepcopy(model).double()(x.double())
        assert {parameter.dtype for parameter in form.state_dict().values()} == {dtype}
        for out, rounded, ref in zip(form(x), model(x), exact, strict=True):
            assert out.dtype == dtype
            rounding = torch.finfo(dtype).eps * ref.abs().max()
            assert (out - ref).abs().max() < 2 * (rounded - ref).abs().max() + 20 * rounding


@pytest.mark.parametrize('mixer_cfg', MIXERS, ids=str)
def test_every_layer_stays_on_its_device(mixer_cfg):
    """An operation on tensors of the meta device and of the CPU raises an error, as for any two devices."""
    model = tiny(mixer_cfg=mixer_cfg)
    expected = deployed(model)
    with torch.device('meta'):  # the default device of new tensors
        form = deployed(model)
    for name, tensor in form.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    model.stages[1:].to('meta')
    devices = {name: str(tensor.device) for name, tensor in deployed(model).state_dict().items()}
    assert devices == {
        name: 'meta' if name.startswith(('stages.1', 'stages.2')) else 'cpu' for name in expected.state_dict()
    }


def test_switch_does_not_advance_the_rng():
    model = tiny()
    before = torch.get_rng_state()
    model.switch_to_deploy()
    assert torch.equal(torch.get_rng_state(), before)


def test_switch_in_inference_mode():
    model = tiny()
    x = torch.randn(16, 3, 64, 48)
    form = copy.deepcopy(model)
    with torch.inference_mode():
        expected = model(x)
        form.switch_to_deploy()
    form.to(memory_format=torch.channels_last)
    assert not any(parameter.is_inference() for parameter in form.parameters())
    for _ in range(2):
        torch.testing.assert_close(form(x), expected, rtol=1e-4, atol=1e-5)


def test_switch_of_a_model_built_in_inference_mode():
    with torch.inference_mode():
        model = tiny()
        x = torch.randn(16, 3, 64, 48)
        expected = model(x)
    form = deployed(model)
    form.to(memory_format=torch.channels_last)
    for _ in range(2):
        torch.testing.assert_close(form(x), expected, rtol=1e-4, atol=1e-5)


class OtherMerging(PatchMerging):
    def forward(self, x):
        return 2 * super().forward(x)


class OtherBlock(Block):
    def forward(self, x):
        return 2 * x, None


def other_activation(model):
    model.stages[0].blocks[0].ffn.fc1.act = nn.GELU()


def other_ffn(model):
    model.stages[0].blocks[0].ffn = nn.Sequential(FFN(16, 32, dict(type='BN')), nn.ReLU())


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda m: setattr(m.stages[0], 'downsample', nn.Conv2d(16, 32, 2, 2)), 'Conv2d .* expected PatchMerging'),
        (lambda m: setattr(m.stages[0].downsample, '__class__', OtherMerging), 'OtherMerging .* expected PatchMerging'),
        (lambda m: setattr(m.stages[1].blocks[1], '__class__', OtherBlock), 'OtherBlock .* expected Block'),
        (lambda m: setattr(m, 'patch_embed', nn.Conv2d(3, 16, 16, 16)), 'Conv2d .* expected Stem'),
        (lambda m: m.patch_embed.conv.__setitem__(1, nn.Conv2d(2, 4, 3, 2, 1)), 'Conv2d .* expected ConvNorm'),
        (other_activation, 'GELU .* expected ReLU'),
        (other_ffn, 'Sequential .* expected FFN'),
    ],
)
def test_unknown_layer_type_raises_and_changes_nothing(change, message):
    model = tiny()
    change(model)
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    with pytest.raises(TypeError, match=message):
        model.switch_to_deploy()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    'name', ['patch_embed.conv.0.conv', 'stages.0.blocks.0.mixer.hz_proj.conv', 'stages.1.blocks.0.dwconv1.norm']
)
def test_hooked_and_parametrized_layers_raise(name):
    model = tiny()
    handle = model.get_submodule(name).register_forward_hook(lambda *call: 2 * call[2])
    with pytest.raises(ValueError, match=r'cannot be folded .* without hooks'):
        model.switch_to_deploy()
    handle.remove()
    nn.utils.parametrizations.weight_norm(model.stages[0].blocks[0].dwconv1.conv)
    with pytest.raises(ValueError, match='ParametrizedConv2d and BatchNorm2d cannot be folded'):
        model.switch_to_deploy()


def mirrored(model):
    model.stages[0].blocks[0].dwconv1.conv.padding_mode = 'reflect'
    model.stages[0].blocks[0].dwconv1.conv._reversed_padding_repeated_twice = [1, 1, 1, 1]


def dilated(model):
    conv = model.stages[0].downsample.conv[1].conv
    conv.dilation = conv.padding = (2, 2)


def biased_mixer(model):
    model.stages[0].blocks[0].mixer.dw.conv.bias = nn.Parameter(torch.ones(27))


def normed_mixer(model):
    model.stages[0].blocks[0].mixer.hz_proj.norm = nn.BatchNorm1d(32)


@pytest.mark.parametrize(
    ('change', 'error', 'message'),
    [
        (mirrored, ValueError, 'padded with zeros'),
        (dilated, ValueError, 'not dilated'),
        (biased_mixer, ValueError, 'Conv2d and Identity cannot be folded'),
        (normed_mixer, TypeError, 'BatchNorm1d .* expected Identity'),
    ],
)
def test_unusual_convolutions_raise(change, error, message):
    model = tiny()
    change(model)
    model.eval()(torch.randn(1, 3, 64, 64))
    with pytest.raises(error, match=message):
        model.switch_to_deploy()


def test_subclass_with_the_same_forward_is_converted():
    class MyConvNorm(ConvNorm):
        pass

    model = tiny()
    model.stages[0].blocks[0].dwconv1.__class__ = MyConvNorm
    assert_same(model, torch.randn(1, 3, 64, 64))


def test_weights_written_through_data_are_used():
    """mmengine's EMAHook writes through ``data`` before validation."""
    form, other = deployed(tiny()), deployed(randomize(EfficientViM(TINY), seed=1))
    x = torch.randn(16, 3, 64, 48)
    for _ in range(2):
        form(x)
    for parameter, value in zip(form.parameters(), other.parameters(), strict=True):
        parameter.data.copy_(value.data)
    for _ in range(3):
        torch.testing.assert_close(form(x), other(x), rtol=0, atol=0)
