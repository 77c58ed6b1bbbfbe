"""Load pretrained weights into the head of a classifier."""

from pathlib import Path

import pytest
import torch
from checkpoint_formats import assert_same, authors_file, head_of, timm_state
from mmengine.model import PretrainedInit
from safetensors.torch import save_file

from mmevm.checkpoints import (
    CheckpointError,
    convert_checkpoint,
    load_pretrained,
)
from mmevm.models import FusionClsHead
from mmevm.registry import MODELS


def make_head(path: Path | None, num_classes: int = 1000, distilled: bool = False, **init_cfg) -> FusionClsHead:
    return FusionClsHead(
        num_classes,
        in_channels=(128, 192, 320, 320),
        distilled=distilled,
        init_cfg=path and dict(type='Pretrained', checkpoint=str(path), **init_cfg),
    )


@pytest.mark.parametrize('dist', ['', '_dist'])
@pytest.mark.parametrize('layout', ['authors', 'timm', 'converted', 'prefix'])
def test_head_receives_every_tensor(tmp_path, layout, dist):
    name = f'efficientvim_m1{dist}'
    state = timm_state(name, 1)
    path = tmp_path / 'x.pth'
    if layout == 'authors':
        authors_file(path, name)
    elif layout == 'timm':
        save_file(state, path)
    else:
        converted = convert_checkpoint(state)[0]
        prefix = 'student.' if layout == 'prefix' else ''
        torch.save({'state_dict': {prefix + key: t for key, t in converted['state_dict'].items()}}, path)
    head = make_head(path, distilled=bool(dist), **(dict(prefix='student.head') if layout == 'prefix' else {}))
    head.init_weights()
    assert_same(head.state_dict(), head_of(state))


@pytest.mark.parametrize('how', ['Pretrained', 'mmengine.Pretrained', PretrainedInit])
def test_classifier_receives_backbone_and_head_from_one_file(tmp_path, how):
    path = authors_file(tmp_path / 'x.pth')
    init_cfg = dict(type=how, checkpoint=str(path))
    model = MODELS.build(
        dict(
            type='mmevm.DistillationClassifier',
            backbone=dict(
                type='mmevm.EfficientViM', arch='m1', out_indices=(2,), out_hidden_states=True, init_cfg=init_cfg
            ),
            head=dict(
                type='mmevm.FusionClsHead', num_classes=1000, in_channels=(128, 192, 320, 320), init_cfg=init_cfg
            ),
            data_preprocessor=dict(type='mmpretrain.ClsDataPreprocessor'),
            init_cfg=dict(type='TruncNormal', layer=['Conv2d', 'Linear'], std=0.02),
        )
    )
    model.init_weights()
    assert_same(model.state_dict(), convert_checkpoint(timm_state('efficientvim_m1', 1))[0]['state_dict'])


@pytest.mark.parametrize('dist', ['', '_dist'])
def test_head_with_other_classes_keeps_random_classifiers(tmp_path, log, dist):
    name = f'efficientvim_m1{dist}'
    path = authors_file(tmp_path / 'x.pth', name)
    state = head_of(timm_state(name, 1))
    head = make_head(path, num_classes=200, distilled=bool(dist))
    head.init_weights()
    received = {key: tensor for key, tensor in state.items() if 'heads' not in key}
    assert set(received) == {key for key in head.state_dict() if 'heads' not in key}
    assert_same({key: head.state_dict()[key] for key in received}, received)
    for linear in [*head.heads, *(head.heads_dist if dist else ())]:
        assert torch.all(linear.bias == 0)
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)  # as without a checkpoint
    logged = [line for line in log.messages if '1000' in line and '200' in line]
    assert logged == [line for line in log.messages if 'random' in line]
    (line,) = logged
    assert f'{path} has 1000 classes, but FusionClsHead has 200: its {16 if dist else 8} tensors' in line
    assert 'heads.0.weight' in line


def test_head_with_the_same_number_of_classes_logs_no_random_weights(tmp_path, log):
    make_head(authors_file(tmp_path / 'x.pth')).init_weights()
    assert any('Loaded 17/17 tensors of FusionClsHead' in line for line in log.messages)
    assert not any('random' in line for line in log.messages)


def head_error(path: Path, state: dict[str, torch.Tensor], **kwargs) -> str:
    torch.save(state, path)
    head = make_head(path, **kwargs)
    head.init_cfg = None
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_pretrained(head, str(path), prefix='head', class_dependent=r'heads(_dist)?\.')
    assert_same(head.state_dict(), before)
    with pytest.raises(CheckpointError, match=r'of the \d+ tensors of FusionClsHead'):
        make_head(path, **kwargs).init_weights()
    return str(error.value)


@pytest.mark.parametrize('name', ['weights', 'norm.3.bias', 'heads.0.bias', 'heads.2.weight'])
def test_incomplete_head_weights_are_an_error(tmp_path, name):
    state = {key: tensor for key, tensor in timm_state('efficientvim_m1').items() if key != name}
    message = head_error(tmp_path / 'x.pth', state)
    assert f"16 of the 17 tensors of FusionClsHead under the prefix 'head.': 1 missing ({name})" in message
    if not name.startswith('heads'):
        assert f'1 missing ({name})' in head_error(tmp_path / 'x.pth', state, num_classes=200)


def test_head_from_a_backbone_or_another_arch_is_an_error(tmp_path):
    state = timm_state('efficientvim_m1')
    backbone = {key: tensor for key, tensor in state.items() if key not in head_of(state)}
    assert '0 of the 17' in head_error(tmp_path / 'x.pth', backbone)
    assert 'norm.1.weight: (192,) expected, (256,) in the file' in head_error(
        tmp_path / 'x.pth', timm_state('efficientvim_m2'), num_classes=200
    )


def test_loading_between_heads_with_and_without_distillation(tmp_path, log):
    path = tmp_path / 'x.pth'
    message = head_error(path, timm_state('efficientvim_m1'), distilled=True)
    assert '17 of the 26 tensors' in message
    assert '9 missing (weights_dist, heads_dist.0.weight' in message

    state = timm_state('efficientvim_m1_dist')
    torch.save(state, path)
    head = make_head(path)
    log.clear()
    head.init_weights()
    assert_same(head.state_dict(), {k: t for k, t in head_of(state).items() if 'dist' not in k})
    beyond = len(state) - 17
    assert any(f'Skipped {beyond} other tensors' in line for line in log.messages)
