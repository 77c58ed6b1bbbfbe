"""Convert detectors of the authors."""

import pytest
import torch
import torch.nn.functional as F
from checkpoint_formats import assert_same, authors_detector, authors_layout, detector_state, timm_state
from command_line import ROOT
from mmengine.config import Config

from mmevm.analysis import build_without_weights
from mmevm.checkpoints import (
    CheckpointError,
    convert_checkpoint,
    read_checkpoint,
)
from mmevm.models import UpsampleFPN


@pytest.mark.parametrize('kind', ['mask-rcnn', 'retinanet'])
def test_convert_detectors_of_the_authors(tmp_path, kind):
    path = tmp_path / 'x.pth'
    torch.save(authors_detector(kind), path)
    converted, report = convert_checkpoint(read_checkpoint(path))
    assert_same(converted['state_dict'], detector_state(kind, 7))
    torch.save(converted, path)
    converted = torch.load(path, weights_only=True)
    assert converted['meta']['dataset_meta'] == {'classes': ('cat', 'dog')}
    assert (report.source, report.arch) == ("a detector of the authors'", 'm1')
    assert set(report.skipped) == {'meta', 'optimizer'}
    assert {name.split('.')[1] for name in report.renamed} == {'batch_norm', 'extra_trans_convs', 'extra_fpn_convs'}
    assert len(report.kept) + len(report.renamed) == len(converted['state_dict'])

    again, report = convert_checkpoint(converted)
    assert again['meta'] == converted['meta']
    assert_same(again['state_dict'], converted['state_dict'])
    assert not report.renamed
    assert not report.reshaped


def authors_neck(state: dict[str, torch.Tensor], maps: list[torch.Tensor], upsamples: int) -> list[torch.Tensor]:
    """Compute the neck of the authors with plain operators. Return its levels, finest first."""

    def conv(name: str, x: torch.Tensor, **kwargs) -> torch.Tensor:
        return F.conv2d(x, state[f'neck.{name}.conv.weight'], state[f'neck.{name}.conv.bias'], **kwargs)

    normed = []
    for i, x in enumerate(maps):
        variance, mean = torch.var_mean(x, dim=1, keepdim=True, unbiased=False)
        x = (x - mean) / (variance + 1e-5).sqrt()
        normed.append(x * state[f'neck.batch_norm.{i}.weight'] + state[f'neck.batch_norm.{i}.bias'])
    laterals = [conv(f'lateral_convs.{i}', x) for i, x in enumerate(normed)]
    for i in (1, 0):
        laterals[i] = laterals[i] + F.interpolate(laterals[i + 1], size=laterals[i].shape[2:], mode='nearest')
    finer = [laterals[0]]  # finest first
    for i in range(upsamples):
        weight, bias = (state[f'neck.extra_trans_convs.{i}.conv.{leaf}'] for leaf in ('weight', 'bias'))
        finer.insert(0, F.conv_transpose2d(finer[0], weight, bias, stride=2))
    levels = [conv(f'extra_fpn_convs.{i}', finer[i], padding=1) for i in range(upsamples)]
    levels += [conv(f'fpn_convs.{i}', x, padding=1) for i, x in enumerate(laterals)]
    if 'neck.fpn_convs.3.conv.weight' in state:
        return [*levels, conv('fpn_convs.3', normed[-1], stride=2, padding=1)]
    return levels


@pytest.mark.parametrize('coarser', [False, True])
@pytest.mark.parametrize('upsamples', [1, 2, 3])
def test_converted_neck_equals_the_neck_of_the_authors(upsamples, coarser):
    channels, width = [128, 192, 320], 16
    shapes = {}
    for i, c in enumerate(channels):
        shapes[f'batch_norm.{i}.weight'] = shapes[f'batch_norm.{i}.bias'] = (1, c, 1, 1)
        shapes[f'lateral_convs.{i}.conv.weight'] = (width, c, 1, 1)
        shapes[f'fpn_convs.{i}.conv.weight'] = (width, width, 3, 3)
    if coarser:
        shapes['fpn_convs.3.conv.weight'] = (width, channels[-1], 3, 3)
    for i in range(upsamples):
        shapes[f'extra_trans_convs.{i}.conv.weight'] = (width, width, 2, 2)
        shapes[f'extra_fpn_convs.{i}.conv.weight'] = (width, width, 3, 3)
    shapes |= {name.replace('weight', 'bias'): (width,) for name in shapes if '.conv.' in name}
    generator = torch.Generator().manual_seed(0)
    neck_state = {f'neck.{name}': torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    backbone = authors_layout(detector_state('mask-rcnn', 7))
    backbone = {name: tensor for name, tensor in backbone.items() if name.startswith('backbone.')}
    converted, report = convert_checkpoint({'state_dict': {**backbone, **neck_state}})

    assert sum(name.startswith('neck.extra_') for name in report.renamed) == 4 * upsamples
    for i in range(upsamples):
        new = f'neck.upsample_fpn_convs.{upsamples - 1 - i}.conv.weight'
        assert report.renamed[f'neck.extra_fpn_convs.{i}.conv.weight'] == new
        assert f'\n  neck.extra_fpn_convs.{i}.* -> neck.upsample_fpn_convs.{upsamples - 1 - i}.* (2)\n' in str(report)

    neck = UpsampleFPN(channels, width, upsamples + 3 + coarser, upsamples, 'on_input' if coarser else False)
    state = converted['state_dict']
    neck.load_state_dict({name[5:]: tensor for name, tensor in state.items() if name.startswith('neck.')})
    maps = [torch.randn(2, c, *size) for c, size in zip(channels, [(9, 13), (5, 7), (3, 4)], strict=True)]
    with torch.no_grad():
        levels = neck(maps)
    expected = authors_neck(neck_state, maps, upsamples)
    assert len(levels) == len(expected) == 3 + upsamples + coarser
    for ours, theirs in zip(levels, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_missing_output_convolution_is_named_by_its_new_index():
    state = dict(authors_detector('mask-rcnn')['state_dict'])
    del state['neck.extra_fpn_convs.1.conv.bias']
    del state['neck.extra_fpn_convs.1.conv.weight']
    with pytest.raises(CheckpointError, match=r'2 missing \(neck\.upsample_fpn_convs\.0\.conv'):
        convert_checkpoint({'state_dict': state})


def test_convert_faster_rcnn_without_mask_head():
    state = {k: v for k, v in authors_detector('mask-rcnn')['state_dict'].items() if 'mask_head' not in k}
    assert len(convert_checkpoint({'state_dict': state})[0]['state_dict']) == len(state)


@pytest.mark.parametrize('arch', ['m1', 'm4'])
def test_stock_neck_with_maps_of_the_stem_is_recognized(arch):
    cfg = Config.fromfile(ROOT / f'configs/faster_rcnn/faster-rcnn_evm_{arch}.py')
    state = build_without_weights(cfg).state_dict()
    converted, report = convert_checkpoint(dict(state_dict=state))
    assert set(converted['state_dict']) == set(state)
    assert report.source == "a checkpoint of mmevm's"


@pytest.mark.parametrize(
    ('finer', 'extra', 'levels', 'channels'),
    [(0, False, 3, 256), (1, False, 3, 48), (2, 'on_input', 4, 32), (1, 'on_output', 4, 320), (0, 'on_output', 5, 24)],
)
def test_convert_necks_with_any_number_of_levels(finer, extra, levels, channels):
    neck = UpsampleFPN(
        in_channels=[128, 192, 320],
        out_channels=channels,
        num_outs=finer + levels,
        num_upsamples=finer,
        add_extra_convs=extra,
    )
    state = {
        key: tensor for key, tensor in timm_state('efficientvim_m1').items() if key.startswith(('patch', 'stages'))
    }
    state |= {f'neck.{key}': tensor for key, tensor in neck.state_dict().items()}
    seed = torch.random.get_rng_state()
    converted, _ = convert_checkpoint(state)
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert len(converted['state_dict']) == len(state)
    last = max(key for key in state if key.startswith('neck.') and key.endswith('bias'))
    for problem, changed in [
        ('missing', {key: tensor for key, tensor in state.items() if key != last}),
        ('unknown', state | {last.replace('bias', 'scale'): state[last]}),
    ]:
        with pytest.raises(CheckpointError, match=rf'1 {problem} \({last[:-4]}'):
            convert_checkpoint(changed)


def test_detectors_need_mmdet_but_classifiers_do_not(monkeypatch):
    monkeypatch.setattr('mmevm.checkpoints.convert.find_spec', lambda name: None)
    convert_checkpoint(timm_state('efficientvim_m1'))
    with pytest.raises(CheckpointError, match='Install MMDetection'):
        convert_checkpoint(authors_detector('retinanet'))
    with pytest.raises(CheckpointError, match='Install MMDetection'):
        convert_checkpoint({'backbone.patch_embed.x': torch.ones(1), 'neck.x': torch.ones(1)})
