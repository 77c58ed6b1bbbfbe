"""Convert segmentors of the authors: backbone, stock FPN and FPNHead."""

import pytest
import timm
import torch
from checkpoint_formats import assert_same, authors_layout, random_weights
from command_line import ROOT
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmevm.analysis import build_without_weights
from mmevm.checkpoints import CheckpointError, convert_checkpoint, read_checkpoint
from mmevm.checkpoints.load import load_strict

pytest.importorskip('mmseg', reason='MMSegmentation is not installed')

CONFIG = ROOT / 'configs/segmentation/fpn_evm_m1_ade20k.py'
CHANNELS = [128, 192, 320]


@pytest.fixture(scope='module')
def parts():
    """timm's backbone, MMSegmentation's FPN and FPNHead, with random weights."""
    modules = dict(
        backbone=timm.create_model('efficientvim_m1', num_classes=0),
        neck=MODELS.build(dict(type='mmseg.FPN', in_channels=CHANNELS, out_channels=256, num_outs=4)),
        decode_head=MODELS.build(
            dict(
                type='mmseg.FPNHead',
                in_channels=[256] * 4,
                in_index=[0, 1, 2, 3],
                feature_strides=[4, 8, 16, 32],
                channels=128,
                num_classes=150,
                norm_cfg=dict(type='BN'),
                loss_decode=dict(type='mmseg.CrossEntropyLoss'),  # whatever the default scope is
            )
        ),
    )
    for module in modules.values():
        module.load_state_dict(random_weights(module.state_dict()))
        module.eval()
    return modules


@pytest.fixture(scope='module')
def theirs(parts):
    """A file as MMSegmentation 0.30 saved it."""
    state = {}
    for part, module in parts.items():
        tensors = {f'{part}.{name}': tensor for name, tensor in module.state_dict().items()}
        unused = ('backbone.norm', 'backbone.weights', 'backbone.head')  # of a classifier
        state |= {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}
    meta = dict(mmseg_version='0.30.0', CLASSES=('wall', 'sky'), PALETTE=[[1, 2, 3], [4, 5, 6]])
    return dict(state_dict=authors_layout(state), meta=meta, optimizer=dict(state={}))


def test_every_tensor_is_accounted_for(theirs):
    with DefaultScope.overwrite_default_scope('mmengine'):  # the command line has no config, whose scope could help
        converted, report = convert_checkpoint(theirs)
    assert (report.source, report.arch) == ("a segmentor of the authors'", 'm1')
    assert not report.renamed
    assert len(report.kept) == len(converted['state_dict']) == len(theirs['state_dict'])
    assert set(report.skipped) == {'meta', 'optimizer'}
    assert report.reshaped
    assert all(name.startswith('backbone.') for name in report.reshaped)
    assert converted['meta']['dataset_meta'] == dict(classes=('wall', 'sky'), palette=[[1, 2, 3], [4, 5, 6]])

    again, report = convert_checkpoint(converted)
    assert_same(again['state_dict'], converted['state_dict'])
    assert not report.reshaped


def test_logits_equal_timm_with_the_stock_decoder(parts, theirs, tmp_path):
    path = tmp_path / 'theirs.pth'
    torch.save(theirs, path)
    converted, _ = convert_checkpoint(read_checkpoint(path))
    torch.save(converted, path)
    model = build_without_weights(Config.fromfile(CONFIG)).eval()
    load_strict(model, str(path))
    for size in [(64, 64), (97, 131), (65, 96)]:
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            maps = parts['backbone'].forward_intermediates(images, intermediates_only=True)
            expected = parts['decode_head'](parts['neck'](maps))
            logits = model(images)
        assert logits.shape == expected.shape == (2, 150, -(-size[0] // 16), -(-size[1] // 16))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize('config', ['segmentation/fpn-s8_evm_m1_cityscapes.py', 'demo/fpn-s8_evm_m1_shapes.py'])
def test_checkpoints_of_the_configs_are_recognized(config):
    state = build_without_weights(Config.fromfile(ROOT / 'configs' / config)).state_dict()
    converted, report = convert_checkpoint(dict(state_dict=state))
    assert set(converted['state_dict']) == set(state)
    assert report.source == "a checkpoint of mmevm's"


@pytest.mark.parametrize('name', ['decode_head.scale_heads.3.4.bn.weight', 'neck.fpn_convs.2.conv.bias'])
def test_missing_and_unknown_tensors(theirs, name):
    state = dict(theirs['state_dict'])
    tensor = state.pop(name)
    with pytest.raises(CheckpointError, match=rf'1 missing \({name}\)'):
        convert_checkpoint(dict(state_dict=state))
    state |= {name: tensor, f'{name}s': tensor}
    with pytest.raises(CheckpointError, match=rf'1 unknown \({name}s\)'):
        convert_checkpoint(dict(state_dict=state))


def test_segmentors_need_mmseg(monkeypatch, theirs):
    monkeypatch.setattr('mmevm.checkpoints.convert.find_spec', lambda name: None)
    with pytest.raises(CheckpointError, match='Install MMSegmentation'):
        convert_checkpoint(theirs)
