import copy

import pytest
import timm
import torch
from mmengine.registry import MODELS, DefaultScope
from randomize import randomize
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmevm.models import EfficientViM
from mmevm.models.efficientvim import Block
from mmevm.registry import MODELS as MMEVM_MODELS

ARCHS = ['m1', 'm2', 'm3', 'm4']
TINY = dict(embed_dims=(16, 24, 32), depths=(1, 2, 1), state_dims=(9, 4, 4))


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return randomize(EfficientViM(TINY))


def make_block(drop_path):
    mixer_cfg, mixer_norm_cfg = dict(type='mmevm.HSMSSD'), dict(type='mmevm.LayerNorm2d')
    return Block(8, 4, 4.0, drop_path, dict(type='BN'), mixer_cfg, mixer_norm_cfg)


def features_and_gradients(model, x):
    model.zero_grad()
    outs = model(x)
    sum((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() for out in outs).backward()
    return outs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class TestAgainstTimm:
    @pytest.mark.parametrize('arch', ARCHS)
    @pytest.mark.parametrize('size', [(2, 3, 224, 224), (1, 3, 97, 131), (1, 3, 32, 32)])
    def test_features(self, arch, size):
        reference = randomize(timm.create_model(f'efficientvim_{arch}')).eval()
        model = EfficientViM(arch).eval()
        missing = model.load_state_dict(reference.state_dict(), strict=False).missing_keys
        assert not missing
        x = torch.randn(size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            outs, expected = model(x), reference.forward_intermediates(x, intermediates_only=True)
        for out, ref in zip(outs, expected, strict=True):
            assert out.shape == ref.shape
            assert (out - ref).abs().max() < 1e-4 * ref.abs().max()

    def test_gradients_of_a_training_step(self):
        reference = randomize(timm.create_model('efficientvim_m1')).double().train()
        model = EfficientViM('m1').double().train()
        model.load_state_dict(reference.state_dict(), strict=False)
        x = torch.randn(2, 3, 64, 96, dtype=torch.double, generator=torch.Generator().manual_seed(0))
        outs, grads = features_and_gradients(model, x)
        expected = reference.forward_intermediates(x, intermediates_only=True)
        sum((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() for out in expected).backward()
        torch.testing.assert_close(outs, tuple(expected), rtol=1e-9, atol=1e-9)
        expected_grads = dict(reference.named_parameters())
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected_grads[name].grad, rtol=1e-6, atol=1e-7)
        # The running statistics of BatchNorm were updated equally.
        stats = reference.state_dict()
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffer, stats[name])


class TestOutput:
    @pytest.mark.parametrize('batch', [1, 3])
    @pytest.mark.parametrize(('height', 'width'), [(64, 64), (33, 200), (17, 16), (1, 1)])
    def test_output_shapes_match_out_channels_and_out_strides(self, tiny, batch, height, width):
        tiny.eval()
        outs = tiny(torch.randn(batch, 3, height, width))
        assert len(outs) == len(tiny.out_channels) == len(tiny.out_strides) == 3
        for out, channels, stride in zip(outs, tiny.out_channels, tiny.out_strides, strict=True):
            assert out.shape == (batch, channels, -(-height // stride), -(-width // stride))
            assert out.isfinite().all()

    @pytest.mark.parametrize('arch', ARCHS)
    def test_every_parameter_except_A_gets_a_gradient(self, arch):
        model = EfficientViM(arch)
        _, grads = features_and_gradients(model, torch.randn(2, 3, 64, 64))
        for name, parameter in model.named_parameters():
            if name.endswith('mixer.A'):
                assert not parameter.requires_grad
            else:
                assert grads[name].isfinite().all(), name
                assert grads[name].any(), name

    @pytest.mark.parametrize('out_indices', [(0,), (1,), (0, 2), [0, 1]])
    def test_out_indices(self, out_indices):
        torch.manual_seed(0)
        whole = randomize(EfficientViM(TINY)).eval()
        part = EfficientViM(TINY, out_indices=out_indices).eval()
        part.load_state_dict(whole.state_dict(), strict=False)
        x = torch.randn(1, 3, 64, 64)
        expected = [whole(x)[i] for i in out_indices]
        torch.testing.assert_close(list(part(x)), expected)
        assert len(part.stages) == max(out_indices) + 1
        grads = features_and_gradients(part, x)[1]
        assert set(grads) == {name for name, p in part.named_parameters() if p.requires_grad}

    @pytest.mark.parametrize('out_strides', [(4, 8, 16, 32), [8, 64], (2, 16), (32,)])
    def test_out_strides(self, out_strides):
        reference = randomize(timm.create_model('efficientvim_m1')).eval()
        model = EfficientViM('m1', out_strides=out_strides).eval()
        assert not model.load_state_dict(reference.state_dict(), strict=False).missing_keys
        stem = []
        for conv in reference.patch_embed.conv[:3]:
            conv.register_forward_hook(lambda module, args, out: stem.append(out))
        x = torch.randn(2, 3, 97, 131)
        outs, stages = model(x), reference.forward_intermediates(x, intermediates_only=True)
        maps = dict(zip((2, 4, 8, 16, 32, 64), [*stem, *stages], strict=True))
        torch.testing.assert_close(list(outs), [maps[stride] for stride in out_strides], rtol=1e-4, atol=1e-5)
        assert model.out_strides == tuple(out_strides)
        assert model.out_channels == tuple(out.shape[1] for out in outs)
        assert len(model.stages) == {16: 1, 32: 2, 64: 3}[max(out_strides)]
        grads = features_and_gradients(model, x)[1]
        assert set(grads) == {name for name, p in model.named_parameters() if p.requires_grad}

    def test_gradients_of_the_maps_of_the_stem(self):
        model = EfficientViM(TINY, out_strides=(2, 4, 8, 16, 32), with_cp=True).train()
        for i, out in enumerate(model(torch.randn(2, 3, 64, 64))[:4]):
            model.zero_grad()
            out.square().mean().backward(retain_graph=True)
            reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
            convs = {name.split('.')[2] for name in reached if name.startswith('patch_embed.conv.')}
            assert convs == {str(conv) for conv in range(i + 1)}
            assert any(name.startswith('stages.') for name in reached) == (i == 3)

    def test_frozen_stem_returns_maps_without_gradients(self):
        model = EfficientViM(TINY, out_strides=(4, 8, 16, 32), frozen_stages=0).train()
        outs = model(torch.randn(2, 3, 64, 64))
        assert [out.requires_grad for out in outs] == [False, False, True, True]

    def test_in_channels_mlp_ratio_and_mixer_arguments(self):
        model = EfficientViM(TINY, in_channels=1, mlp_ratio=2.0, mixer_cfg=dict(type='mmevm.HSMSSD', ssd_expand=0.5))
        block = model.stages[0].blocks[0]
        assert block.ffn.fc1.conv.out_channels == 2 * 16
        assert block.mixer.hz_proj.conv.out_channels == 2 * 8
        assert model(torch.randn(2, 1, 64, 64))[0].shape == (2, 16, 4, 4)

    def test_images_of_a_batch_are_independent(self, tiny):
        tiny.eval()
        x = torch.randn(3, 3, 48, 48)
        alone = torch.cat([tiny(x[i : i + 1])[2] for i in range(3)])
        torch.testing.assert_close(tiny(x)[2], alone, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize('norm_eval', [False, True])
    @pytest.mark.parametrize('channels_last', [None, True])
    @pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.double, 1e-9), (torch.float, 2e-3)])
    def test_channels_last(self, norm_eval, channels_last, dtype, tolerance):
        """The same features and gradients; the maps keep the memory format."""

        def run(channels_last, x):
            settings = dict(norm_eval=norm_eval, channels_last=channels_last, out_strides=(4, 16, 32, 64))
            torch.manual_seed(0)
            model = randomize(EfficientViM(TINY, **settings)).to(dtype).train()
            return features_and_gradients(model, x)

        x = torch.randn(2, 3, 96, 80, dtype=dtype)
        expected, expected_gradients = run(False, x)
        assert not any(feature.is_contiguous(memory_format=torch.channels_last) for feature in expected)
        for images in (x, x.to(memory_format=torch.channels_last)):
            maps, gradients = run(channels_last, images)
            assert all(feature.is_contiguous(memory_format=torch.channels_last) for feature in maps)
            tolerances = dict(rtol=tolerance, atol=tolerance)
            torch.testing.assert_close((maps, gradients), (expected, expected_gradients), **tolerances)

    @pytest.mark.parametrize('channels_last', [None, True])
    def test_channels_last_on_another_device(self, channels_last):
        with torch.device('meta'):
            model, x, seen = EfficientViM(TINY, channels_last=channels_last), torch.empty(2, 3, 96, 80), []
        model.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        model(x)
        assert seen[0].is_contiguous(memory_format=torch.channels_last) is bool(channels_last)


class TestHiddenStates:
    @pytest.mark.parametrize('out_indices', [(2,), (0, 1, 2), (0, 1), (0,)])
    def test_hidden_states_of_the_last_blocks_come_before_the_maps(self, out_indices):
        torch.manual_seed(0)
        model = randomize(EfficientViM(TINY, out_indices=out_indices, out_hidden_states=True)).eval()
        plain = EfficientViM(TINY, out_indices=out_indices).eval()
        plain.load_state_dict(model.state_dict())
        seen = []
        for stage in model.stages:
            stage.blocks[-1].mixer.register_forward_hook(lambda module, args, out: seen.append(out[1]))
        x = torch.randn(3, 3, 33, 64)
        outs, maps = model(x), plain(x)
        stages = max(out_indices) + 1
        assert len(seen) == stages
        assert [out.shape for out in outs[:stages]] == [(3, 16, 9), (3, 24, 4), (3, 32, 4)][:stages]
        torch.testing.assert_close(list(outs), [*seen, *maps], rtol=0, atol=0)
        assert len(maps) == len(out_indices) == len(model.out_strides)
        assert model.out_channels == tuple(out.shape[1] for out in outs)
        assert plain.out_channels == tuple(out.shape[1] for out in maps)

    @pytest.mark.parametrize('with_cp', [False, True])
    def test_hidden_states_carry_gradients(self, with_cp):
        model = EfficientViM(TINY, out_indices=(2,), out_hidden_states=True, with_cp=with_cp).train()
        hidden = model(torch.randn(2, 3, 64, 64))[:3]
        for i, states in enumerate(hidden):
            model.zero_grad()
            states.square().mean().backward(retain_graph=True)
            got = {
                name.split('.')[1] for name, p in model.named_parameters() if 'stages' in name and p.grad is not None
            }
            assert got == {str(stage) for stage in range(i + 1)}


@MMEVM_MODELS.register_module()
class MeanMixer(nn.Module):
    """A custom mixer without hidden states."""

    def __init__(self, channels, state_dim, scale=1.0):
        super().__init__()
        self.channels, self.state_dim, self.scale = channels, state_dim, scale

    def forward(self, x):
        return self.scale * x.mean((2, 3), keepdim=True).expand_as(x), None


class TestCustomMixer:
    def test_custom_mixer_is_built_for_each_block_and_used(self):
        model = EfficientViM(TINY, mixer_cfg=dict(type='mmevm.MeanMixer', scale=2.0)).eval()
        for i, stage in enumerate(model.stages):
            for block in stage.blocks:
                assert type(block.mixer) is MeanMixer
                assert (block.mixer.channels, block.mixer.state_dim) == (TINY['embed_dims'][i], TINY['state_dims'][i])
        block = randomize(model.stages[0].blocks[0])
        block.alpha.data[[0, 2, 3]] = -60  # only the mixer's gate is open
        block.alpha.data[1] = 60
        x = torch.randn(2, 16, 4, 5)
        torch.testing.assert_close(block(x)[0], 2 * block.norm(x).mean((2, 3), keepdim=True).expand_as(x))

    @pytest.mark.parametrize('with_cp', [False, True])
    def test_hidden_states_are_required_only_if_returned(self, with_cp):
        cfg = dict(mixer_cfg=dict(type='mmevm.MeanMixer'), with_cp=with_cp)
        assert features_and_gradients(EfficientViM(TINY, **cfg), torch.randn(2, 3, 64, 64))[1]
        with pytest.raises(ValueError, match='MeanMixer has no hidden states: set out_hidden_states=False'):
            EfficientViM(TINY, out_hidden_states=True, **cfg)(torch.randn(2, 3, 64, 64))

    def test_norm_before_the_mixer(self):
        model = EfficientViM(TINY, norm_cfg=dict(type='SyncBN'), mixer_norm_cfg=dict(type='BN', eps=1e-3))
        for stage in model.stages:
            for block in stage.blocks:
                assert type(block.norm) is nn.BatchNorm2d
                assert block.norm.eps == 1e-3
                assert isinstance(block.dwconv1.norm, nn.SyncBatchNorm)
        model = EfficientViM(TINY, mixer_norm_cfg=dict(type='BN')).train()
        grads = features_and_gradients(model, torch.randn(2, 3, 64, 64))[1]
        assert grads['stages.2.blocks.0.norm.weight'].any()
        assert model.stages[2].blocks[0].norm.num_batches_tracked == 1

    def test_unknown_argument_raises(self):
        with pytest.raises(TypeError, match='scal'):
            EfficientViM(TINY, mixer_cfg=dict(type='mmevm.MeanMixer', scal=2.0))


class TestGate:
    """x ← (1 − g)·x + g·f(x)."""

    def test_closed_gates_are_the_identity_and_open_gates_the_layers(self):
        block = randomize(make_block(drop_path=0.0)).double().eval()
        x = torch.randn(2, 8, 5, 7, dtype=torch.double)
        block.alpha.data.fill_(-60)
        torch.testing.assert_close(block(x)[0], x)
        block.alpha.data.fill_(60)
        mixed = block.mixer(block.norm(block.dwconv1(x)))[0]
        torch.testing.assert_close(block(x)[0], block.ffn(block.dwconv2(mixed)))

    def test_drop_path_keeps_dropped_samples_and_scales_the_others(self):
        block = randomize(make_block(drop_path=0.5)).double().train()
        x, fx = torch.randn(2, 64, 8, 3, 3, dtype=torch.double)
        gate = torch.rand(8, 1, 1, dtype=torch.double)
        torch.manual_seed(0)
        out = block._gate(x, fx, gate)
        dropped = (out == x).flatten(1).all(1)
        assert 0 < dropped.sum() < 64
        torch.testing.assert_close(out[~dropped], (x + 2 * gate * (fx - x))[~dropped])
        torch.testing.assert_close(block.eval()._gate(x, fx, gate), (1 - gate) * x + gate * fx)

    def test_drop_path_rate_rises_linearly(self):
        model = EfficientViM('m4', drop_path_rate=0.3)
        rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
        assert rates == pytest.approx([0.3 * i / 8 for i in range(9)])


class TestTraining:
    @pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 3])
    def test_frozen_stages_stay_frozen_and_in_eval_mode(self, frozen_stages):
        model = EfficientViM(TINY, frozen_stages=frozen_stages)
        assert model.train() is model
        for i, part in enumerate([model.patch_embed, *model.stages]):
            frozen = i <= frozen_stages
            assert all(module.training != frozen for module in part.modules())
            assert all(not p.requires_grad for p in part.parameters()) == frozen
        before = copy.deepcopy(model.state_dict())
        if frozen_stages < 3:
            features_and_gradients(model, torch.randn(2, 3, 64, 64))
        else:
            model(torch.randn(2, 3, 64, 64))
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert all(not name.startswith('patch_embed') for name in changed) == (frozen_stages >= 0)
        for i in range(3):
            assert all(not name.startswith(f'stages.{i}.') for name in changed) == (frozen_stages > i)

    def test_norm_eval_keeps_statistics_but_trains_weights(self):
        model = EfficientViM(TINY, norm_eval=True).train()
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        assert norms
        assert not any(m.training for m in norms)
        before = copy.deepcopy(dict(model.named_buffers()))
        grads = features_and_gradients(model, torch.randn(2, 3, 64, 64))[1]
        torch.testing.assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)
        assert 'patch_embed.conv.0.norm.weight' in grads

    @pytest.mark.parametrize('norm_eval', [False, True])
    def test_activation_checkpointing_changes_neither_gradients_nor_statistics(self, norm_eval):
        torch.manual_seed(0)
        plain = randomize(EfficientViM(TINY, norm_eval=norm_eval)).double().train()
        saving = EfficientViM(TINY, norm_eval=norm_eval, with_cp=True).double().train()
        saving.load_state_dict(plain.state_dict())
        x = torch.randn(2, 3, 64, 64, dtype=torch.double)
        for (out, grads), (ref, expected) in [(features_and_gradients(saving, x), features_and_gradients(plain, x))]:
            torch.testing.assert_close(out, ref)
            torch.testing.assert_close(grads, expected)
        torch.testing.assert_close(dict(saving.named_buffers()), dict(plain.named_buffers()))

    def test_activation_checkpointing_recomputes_the_blocks(self):
        model = EfficientViM(TINY, with_cp=True).train()
        calls = []
        for block in model.stages[1].blocks:
            block.register_forward_pre_hook(lambda *_: calls.append(1))
        features_and_gradients(model, torch.randn(2, 3, 64, 64))
        assert len(calls) == 2 * len(model.stages[1].blocks)

    def test_activation_checkpointing_is_off_in_eval_mode(self):
        """torch.export and torch.compile(fullgraph=True) cannot trace it."""
        model = EfficientViM(TINY, with_cp=True).eval()
        calls = []
        for block in model.stages[1].blocks:
            block.register_forward_pre_hook(lambda *_: calls.append(1))
        sum(map(torch.sum, model(torch.randn(1, 3, 64, 64)))).backward()
        assert len(calls) == len(model.stages[1].blocks)

    def test_compiled_activation_checkpointing_changes_neither_gradients_nor_statistics(self):
        plain = randomize(EfficientViM(TINY)).double().train()
        saving = EfficientViM(TINY, with_cp=True).double().train()
        saving.load_state_dict(plain.state_dict())
        compiled = torch.compile(saving, backend='eager')
        x = torch.randn(2, 3, 64, 64, dtype=torch.double)
        for _ in range(2):
            out, ref = compiled(x), plain(x)
            torch.testing.assert_close(out, ref)
            sum(map(torch.sum, out)).backward()
            sum(map(torch.sum, ref)).backward()
        for parameter, expected in zip(saving.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, expected.grad)
        torch.testing.assert_close(dict(saving.named_buffers()), dict(plain.named_buffers()))

    def test_norm_cfg(self):
        model = EfficientViM(TINY, norm_cfg=dict(type='SyncBN'))
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        assert norms
        assert all(isinstance(m, nn.SyncBatchNorm) for m in norms)
        model = EfficientViM(TINY, norm_cfg=dict(type='BN', momentum=0.01, requires_grad=False))
        norm = model.patch_embed.conv[0].norm
        assert norm.momentum == 0.01
        assert not norm.weight.requires_grad


class TestReducedPrecision:
    @pytest.mark.parametrize('scale', [1.0, 1e4])
    def test_autocast_bf16_is_close(self, tiny, scale):
        tiny.eval()
        x = scale * torch.randn(1, 3, 96, 96)
        expected = tiny(x)
        with torch.autocast('cpu', torch.bfloat16):
            outs = tiny(x)
        for out, ref in zip(outs, expected, strict=True):
            assert out.isfinite().all()
            assert (out.float() - ref).norm() < 0.05 * ref.norm()

    @pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
    def test_autocast_on_a_gpu_is_close(self, tiny, dtype):
        tiny.eval().cuda()
        x = torch.randn(1, 3, 512, 512, device='cuda')
        expected = tiny(x)
        with torch.autocast('cuda', dtype):
            outs = tiny(x)
        for out, ref in zip(outs, expected, strict=True):
            assert out.isfinite().all()
            assert (out.float() - ref).norm() < 0.05 * ref.norm()


class TestArguments:
    @pytest.mark.parametrize(
        ('arguments', 'allowed'),
        [
            (dict(arch='m5'), 'm1.*m2.*m3.*m4'),
            (dict(arch=dict(embed_dims=(16,), depths=(1,))), 'state_dims'),
            (dict(arch=dict(TINY, heads=(1, 1, 1))), 'heads'),
            (dict(arch=dict(TINY, depths=(1, 1))), 'one entry for each stage'),
            (dict(arch=dict(TINY, embed_dims=(12, 24, 32))), 'multiple of 8'),
            (dict(arch=dict(TINY, depths=(1, 0, 1))), 'positive'),
            (dict(out_indices=(0, 3)), r'\[0, 1, 2\]'),
            (dict(out_indices=(1, 0)), 'ascending'),
            (dict(out_indices=()), 'one or more'),
            (dict(out_indices=2), r'tuple or list, such as \(2,\)'),
            (dict(out_strides=(8, 24)), r'\[2, 4, 8, 16, 32, 64\]'),
            (dict(out_strides=(16, 8)), 'ascending'),
            (dict(out_strides=16), r'out_strides=16: give a tuple or list, such as \(16,\)'),
            (dict(out_strides=(4, 8)), r'at least one of \[16, 32, 64\]'),
            (dict(out_strides=(8, 64), arch=dict(embed_dims=(16,), depths=(1,), state_dims=(4,))), r'4, 8, 16\],'),
            (dict(out_strides=(8, 16), out_indices=(0, 1)), r'out_strides=.* out_indices=\(0, 1\) .* to None'),
            (dict(out_strides=(8, 16), frozen_stages=2), r'to 1 .*out_strides=\(8, 16\)'),
            (dict(arch=None), 'm1.*m2.*m3.*m4'),
            (dict(frozen_stages=4), 'frozen_stages=4'),
            (dict(frozen_stages=-2), 'frozen_stages=-2'),
            (dict(frozen_stages=3, out_indices=(0, 1)), 'to 2 .*out_indices='),
            (dict(drop_path_rate=1.0), 'drop_path_rate'),
            (dict(mlp_ratio=0), 'mlp_ratio'),
            (dict(mixer_cfg=dict(type='mmevm.HSMSSD', ssd_expand=-1.0)), 'ssd_expand'),
            (dict(in_channels=0), 'in_channels'),
        ],
    )
    def test_invalid_argument_raises(self, arguments, allowed):
        with pytest.raises(ValueError, match=allowed):
            EfficientViM(**arguments)

    def test_unknown_argument_raises(self):
        with pytest.raises(TypeError, match='frozen_stage'):
            EfficientViM('m1', frozen_stage=1)


@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmpretrain'])
def test_built_from_every_default_scope(scope):
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(dict(type='mmevm.EfficientViM', arch='m1'))
    assert type(model) is EfficientViM


def test_initial_weights():
    model = EfficientViM('m1')
    model.init_weights()
    block = model.stages[0].blocks[0]
    assert torch.all(block.alpha == 1e-4)
    assert torch.all(block.mixer.D == 1)
    assert block.mixer.A.min() >= 1
    assert block.mixer.A.max() <= 16
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            assert torch.all(module.weight == 1)
            assert torch.all(module.bias == 0)
