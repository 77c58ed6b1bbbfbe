"""Load pretrained weights into a backbone."""

from pathlib import Path

import pytest
import torch
from checkpoint_formats import (
    assert_same,
    authors_detector,
    authors_file,
    detector_state,
    random_weights,
    timm_features,
    timm_state,
)
from mmengine.model import PretrainedInit
from safetensors.torch import save_file
from torch import nn

from mmevm.checkpoints import (
    CheckpointError,
    convert_checkpoint,
    load_pretrained,
)
from mmevm.models import EfficientViM
from mmevm.models.weight_init import pretrained_cfgs
from mmevm.registry import MODELS


@pytest.mark.parametrize('layout', ['authors', 'timm', 'safetensors', 'converted', 'backbone', 'distributed'])
def test_backbone_receives_every_tensor(tmp_path, layout):
    state = timm_state('efficientvim_m1', 1)
    path = tmp_path / 'x.pth'
    if layout == 'safetensors':
        save_file(state, path)
    elif layout in ('authors', 'distributed'):
        authors_file(path, prefix='module.' if layout == 'distributed' else '')
    elif layout == 'converted':
        torch.save(convert_checkpoint(state)[0], path)
    else:
        torch.save({k: v for k, v in state.items() if layout == 'timm' or k.startswith(('patch', 'stages'))}, path)
    backbone = MODELS.build(
        dict(type='mmevm.EfficientViM', arch='m1', init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    )
    backbone.init_weights()
    assert_same(backbone.state_dict(), {k: v for k, v in state.items() if k.startswith(('patch', 'stages'))})

    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for ours, theirs in zip(backbone.eval()(images), timm_features('efficientvim_m1', state, images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_backbone_from_a_detector_with_and_without_prefix(tmp_path):
    path = tmp_path / 'x.pth'
    torch.save(authors_detector('retinanet'), path)
    expected = {k[9:]: v for k, v in detector_state('retinanet', 7).items() if k.startswith('backbone.')}
    for prefix in (None, 'backbone', 'backbone.'):
        backbone = EfficientViM('m1')
        load_pretrained(backbone, str(path), prefix=prefix)
        assert_same(backbone.state_dict(), expected)
    torch.save({f'teacher.{k}': v for k, v in authors_detector('retinanet')['state_dict'].items()}, path)
    backbone = EfficientViM('m1')
    load_pretrained(backbone, str(path), prefix='teacher.backbone.')
    assert_same(backbone.state_dict(), expected)


def test_backbone_with_fewer_stages_or_custom_arch(tmp_path):
    state = timm_state('efficientvim_m1')
    path = tmp_path / 'x.pth'
    torch.save(state, path)
    for outputs in (dict(out_indices=(0, 1)), dict(out_strides=(8, 16, 32))):
        backbone = EfficientViM('m1', **outputs)
        load_pretrained(backbone, str(path))
        assert_same(backbone.state_dict(), {k: state[k] for k in backbone.state_dict()})

    own = EfficientViM(dict(embed_dims=(16, 24), depths=(1, 1), state_dims=(4, 4)), out_indices=(0, 1))
    expected = random_weights(own.state_dict())
    torch.save({'state_dict': {f'backbone.{k}': v for k, v in expected.items()}}, path)
    load_pretrained(own, str(path))
    assert_same(own.state_dict(), expected)


@pytest.mark.parametrize('how', ['Pretrained', 'mmengine.Pretrained', PretrainedInit])
def test_checkpoint_of_another_network_is_an_error_for_each_type_of_init_cfg(tmp_path, how):
    torch.save({'state_dict': {'layer.weight': torch.zeros(1)}}, tmp_path / 'x.pth')
    backbone = EfficientViM('m1', init_cfg=dict(type=how, checkpoint=str(tmp_path / 'x.pth')))
    with pytest.raises(CheckpointError, match=r'0 of the \d+ tensors'):
        backbone.init_weights()


def load_error(path: Path, checkpoint: dict, prefix: str | None = None, **kwargs) -> str:
    torch.save(checkpoint, path)
    backbone = EfficientViM(**{'arch': 'm1', **kwargs})
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_pretrained(backbone, str(path), prefix=prefix)
    assert_same(backbone.state_dict(), before)
    assert 'init_cfg=None' in str(error.value)
    return str(error.value)


def test_incomplete_backbone_weights_are_an_error(tmp_path):
    path = tmp_path / 'x.pth'
    state = timm_state('efficientvim_m1')
    total = len(EfficientViM('m1').state_dict())

    message = load_error(path, state, prefix='teacher.')
    assert f"0 of the {total} tensors of EfficientViM under the prefix 'teacher.'" in message
    assert 'init_cfg.prefix' in message
    assert '0 of the' in load_error(path, nn.Linear(2, 2).state_dict())

    message = load_error(path, {k: v for k, v in state.items() if not k.endswith('mixer.A')})
    assert f'{total - 6} of the {total}' in message
    assert '6 missing (stages.0.blocks.0.mixer.A' in message
    assert '1 missing (stages.2.blocks.1.dwconv2.norm.num_batches_tracked)' in load_error(
        path, {k: v for k, v in state.items() if k != 'stages.2.blocks.1.dwconv2.norm.num_batches_tracked'}
    )

    message = load_error(path, state, arch='m2')
    assert 'stages.1.blocks.0.alpha' in message or 'of another shape' in message
    assert '(4, 256) expected, (4, 192) in the file' in message or 'Check that arch' in message

    message = load_error(path, state, in_channels=4)
    assert 'patch_embed.conv.0.conv.weight: (16, 4, 3, 3) expected, (16, 3, 3, 3) in the file' in message
    assert 'in_channels' in message.split('. ', 1)[1]


def test_errors_suggest_a_solution(tmp_path):
    path = tmp_path / 'x.pth'
    state = timm_state('efficientvim_m1')
    names = ', '.join(list(state)[:4])
    assert f'The names in the file are {names}, …. Set init_cfg.prefix' in load_error(path, state, prefix='student')
    assert 'in_channels=4, the file has weights for 3 channels' in load_error(path, state, in_channels=4)
    for other in ({}, {'patch_embed.conv.0.conv.weight': torch.ones(())}):
        message = load_error(path, {'stages.0.x': torch.ones(1), **other})
        assert 'Check that arch' in message
        assert 'under the prefix' in message


def test_loaded_and_skipped_tensors_are_logged(tmp_path, log):
    path = authors_file(tmp_path / 'x.pth')
    backbone = EfficientViM('m1')
    log.clear()
    load_pretrained(backbone, str(path))
    state = timm_state('efficientvim_m1')
    count = len(backbone.state_dict())
    beyond = 'head.weights, head.norm.0.weight, head.norm.0.bias, head.norm.1.weight'
    assert log.messages == [
        f'Loaded {count}/{count} tensors of EfficientViM from {path} (ema weights).',
        f'Skipped {len(state) - count} other tensors of {path} ({beyond}, …).',
    ]
    torch.save({f'backbone.{name}': tensor for name, tensor in backbone.state_dict().items()}, path)
    log.clear()
    load_pretrained(backbone, str(path))
    assert log.messages == [f'Loaded {count}/{count} tensors of EfficientViM from {path}.']


def test_pretrained_cfgs():
    ours = dict(checkpoint='x.pth', prefix='backbone.')
    cfg = dict(type='Pretrained', **ours)
    assert pretrained_cfgs(None) == pretrained_cfgs([]) == pretrained_cfgs({}) == []
    assert pretrained_cfgs(dict(type='Kaiming', layer='Conv2d')) == []
    assert pretrained_cfgs(cfg) == [ours]
    several = [dict(type='Kaiming', layer='Conv2d'), cfg, {}, dict(type=PretrainedInit, checkpoint='y.pth')]
    assert pretrained_cfgs(several) == [ours, dict(checkpoint='y.pth')]
