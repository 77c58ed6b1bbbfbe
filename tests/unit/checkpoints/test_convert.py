"""Convert classifiers of the authors and timm, and report what was converted."""

import dataclasses

import pytest
import torch
from checkpoint_formats import assert_same, authors_file, authors_layout, head_of, timm_features, timm_state
from mmengine.runner.checkpoint import _load_checkpoint_with_prefix

from mmevm.checkpoints import (
    CheckpointError,
    ConversionReport,
    convert_checkpoint,
    read_checkpoint,
)
from mmevm.models import EfficientViM


@pytest.mark.parametrize('dist', ['', '_dist'])
@pytest.mark.parametrize('arch', ['m1', *(pytest.param(arch, marks=pytest.mark.slow) for arch in ('m2', 'm3')), 'm4'])
def test_convert_classifiers_of_the_authors(tmp_path, arch, dist):
    name = f'efficientvim_{arch}{dist}'
    checkpoint = read_checkpoint(authors_file(tmp_path / 'x.pth', name))
    images = torch.rand(2, 3, 96, 160)
    for weights, seed in {None: 1, 'ema': 1, 'model': 0}.items():
        converted, report = convert_checkpoint(checkpoint, weights)
        theirs = timm_state(name, seed)
        assert_same(
            converted['state_dict'],
            {('backbone.' if key.startswith(('patch', 'stages')) else 'head.') + key: t for key, t in theirs.items()},
        )
        assert (report.arch, report.weights) == (arch, 'model' if weights == 'model' else 'ema')
        assert "classifier of the authors'" in report.source
        assert set(report.renamed) == set(theirs)
        other = 'model_ema' if weights == 'model' else 'model'
        assert set(report.skipped) == {other, 'optimizer', 'epoch', 'config', 'args'}
        assert 'gone.CfgNode' in report.skipped['config']

    backbone = EfficientViM(arch).eval()
    prefix = len('backbone.')
    backbone.load_state_dict({k[prefix:]: v for k, v in converted['state_dict'].items() if k.startswith('backbone.')})
    with torch.no_grad():
        for ours, theirs in zip(backbone(images), timm_features(name, timm_state(name, 0), images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize('wrapper', [None, 'state_dict', 'model'])
def test_convert_classifier_of_timm(wrapper):
    state = timm_state('efficientvim_m2_dist')
    checkpoint = {wrapper: state, 'epoch': 3} if wrapper else state
    converted, report = convert_checkpoint(checkpoint)
    expected = {('backbone.' if k.startswith(('patch', 'stages')) else 'head.') + k: t for k, t in state.items()}
    assert_same(converted['state_dict'], expected)
    assert (report.source, report.arch, report.reshaped) == ("a classifier in timm's layout", 'm2', [])
    assert set(report.skipped) == ({'epoch'} if wrapper else set())


@pytest.mark.parametrize(('weights', 'seed'), [(None, 1), ('ema', 1), ('model', 0)])
def test_convert_training_checkpoint_of_timm(weights, seed):
    states = {'state_dict': timm_state('efficientvim_m1', 0), 'state_dict_ema': timm_state('efficientvim_m1', 1)}
    converted, report = convert_checkpoint({**states, 'arch': 'efficientvim_m1'}, weights)
    assert_same(converted['state_dict'], convert_checkpoint(timm_state('efficientvim_m1', seed))[0]['state_dict'])
    assert report.weights == ('model' if seed == 0 else 'ema')
    chosen, other = list(states) if seed == 0 else reversed(states)
    assert report.skipped == {
        other: f"'{chosen}' was chosen ({len(states[other])} entries)",
        'arch': f"not part of '{chosen}' (str)",
    }


def test_entries_without_tensors_are_skipped():
    state = timm_state('efficientvim_m1')
    converted, report = convert_checkpoint(
        {'state_dict': state, 'model': {'type': 'a config'}, 'model_ema': {'rate': 1}}
    )
    assert_same(converted['state_dict'], convert_checkpoint(state)[0]['state_dict'])
    assert set(report.skipped) == {'model', 'model_ema'}


def test_missing_choice_of_weights_is_an_error():
    state = timm_state('efficientvim_m1')
    for checkpoint, weights in [
        ({'model': state}, 'ema'),
        ({'model_ema': state, 'model': None}, 'model'),
        ({'model_ema': state, 'model': {'type': 'a config'}}, 'model'),
        (state, 'ema'),
    ]:
        with pytest.raises(CheckpointError, match=f"weights='{weights}' is not in the file"):
            convert_checkpoint(checkpoint, weights)
    with pytest.raises(ValueError, match='must be'):
        convert_checkpoint(state, 'emma')


def test_convert_data_parallel_prefix_dtype_and_number_of_classes(tmp_path):
    plain = {}
    for name, tensor in authors_layout(timm_state('efficientvim_m1')).items():
        if name.startswith('heads.'):
            tensor = tensor[:10]
        plain[f'module.{name}'] = tensor.bfloat16() if tensor.is_floating_point() else tensor
    state = convert_checkpoint({'model': plain})[0]['state_dict']
    assert state['head.heads.3.weight'].shape == (10, 320)
    assert state['backbone.stages.0.blocks.0.norm.weight'].shape == (128,)
    for name, tensor in state.items():
        old = plain['module.' + name.removeprefix('backbone.').removeprefix('head.')]
        assert tensor.dtype == old.dtype == (torch.long if name.endswith('tracked') else torch.bfloat16)
        assert torch.equal(tensor.flatten(), old.flatten())


def test_converting_twice_changes_nothing(tmp_path):
    converted, _ = convert_checkpoint(read_checkpoint(authors_file(tmp_path / 'x.pth')))
    torch.save(converted, tmp_path / 'y.pth')
    again, report = convert_checkpoint(torch.load(tmp_path / 'y.pth', weights_only=True))
    assert again['meta'] == converted['meta']
    assert_same(again['state_dict'], converted['state_dict'])
    assert not report.renamed
    assert not report.reshaped


def test_mmengine_reads_a_converted_file(tmp_path):
    converted, _ = convert_checkpoint(read_checkpoint(authors_file(tmp_path / 'x.pth')))
    torch.save(converted, tmp_path / 'y.pth')
    backbone = EfficientViM('m1')
    backbone.load_state_dict(_load_checkpoint_with_prefix('backbone.', str(tmp_path / 'y.pth')), strict=True)
    expected = timm_state('efficientvim_m1', 1)
    assert_same(backbone.state_dict(), {k: expected[k] for k in backbone.state_dict()})


@pytest.mark.parametrize(
    ('wrapper', 'weights'),
    [(None, None), ('state_dict', None), ('model', 'model'), ('model_ema', 'ema'), ('state_dict_ema', 'ema')],
)
@pytest.mark.parametrize('part', ['classifier', 'backbone', 'detector'])
@pytest.mark.parametrize('theirs', [True, False])
def test_report_accounts_for_every_entry(wrapper, weights, part, theirs):
    plain = timm_state('efficientvim_m1')
    if part != 'classifier':
        plain = {name: tensor for name, tensor in plain.items() if name not in head_of(plain)}
    state = authors_layout(plain) if theirs else dict(plain)
    if part == 'detector':
        state = {f'backbone.{name}': tensor for name, tensor in state.items()}
    others = {'epoch': 3, 'log': [1, 2], 'meta': {}}
    converted, report = convert_checkpoint({wrapper: state, **others} if wrapper else {**state, 7: 'x', **others})
    source = {True: "a {} of the authors'", False: "a {} in timm's layout"}[theirs].format(part)
    if part == 'detector':
        source = "a detector of the authors'" if theirs else "a checkpoint of mmevm's"
    assert converted['meta'] == {'source': source, 'arch': 'm1', 'weights': weights}
    assert (report.source, report.arch, report.weights) == (source, 'm1', weights)
    reason = f"not part of '{wrapper}'" if wrapper else 'not a named tensor'
    assert report.skipped == {
        **({} if wrapper else {'7': f'{reason} (str)'}),
        **{'epoch': f'{reason} (int)', 'log': f'{reason} (2 entries)', 'meta': f'{reason} (0 entries)'},
    }
    prefixed = {
        name: ('' if part == 'detector' else 'head.' if name in head_of(state) else 'backbone.') + name
        for name in state
    }
    assert report.renamed == ({} if part == 'detector' else prefixed)
    assert report.kept == (list(state) if part == 'detector' else [])
    assert report.reshaped == [prefixed[name] for name in state if theirs and state[name].dim() > 2 and 'norm' in name]


def test_report_as_text():
    report = ConversionReport(
        source="a classifier of the authors'",
        arch='m4',
        weights='ema',
        kept=['head.norm.0.bias', 'head.norm.0.weight'],
        renamed={
            'stages.0.blocks.1.alpha': 'backbone.stages.0.blocks.1.alpha',
            'stages.1.blocks.0.alpha': 'backbone.stages.1.blocks.0.alpha',
            'weights': 'head.weights',
            'neck.batch_norm.0.bias': 'neck.pre_norms.0.bias',
        },
        reshaped=['neck.pre_norms.0.bias'],
        skipped={'epoch': 'not a named tensor (int)'},
    )
    words = """
recognized: a classifier of the authors', EfficientViM-M4, ema weights
converted: 6 tensors, 1 LayerNorms flattened
renamed: 4
  stages.* -> backbone.stages.* (2)
  weights -> head.weights (1)
  neck.batch_norm.* -> neck.pre_norms.* (1)
skipped: 1
  epoch: not a named tensor (int)"""
    assert str(report) == words.strip()
    assert 'EfficientViM-M4\nconverted' in str(dataclasses.replace(report, weights=None))


@pytest.mark.parametrize(
    ('meta', 'kept'),
    [
        ({'CLASSES': ['cat'], 'PALETTE': [(1, 2, 3)]}, {'classes': ['cat'], 'palette': [(1, 2, 3)]}),
        (
            {'dataset_meta': {'classes': ('cat',), 'palette': 'coco', 'more': 1}},
            {'classes': ('cat',), 'palette': 'coco'},
        ),
        ({'dataset_meta': {'classes': ('cat',), 'palette': [(None,)]}, 'CLASSES': ('dog',)}, {'classes': ('cat',)}),
        ({'dataset_meta': {'classes': (torch.zeros(1),), 'palette': 'coco'}}, None),
        ({'dataset_meta': {'classes': 'cat'}}, None),
        ({'dataset_meta': ['cat']}, None),
        ({'PALETTE': [(1, 2, 3)]}, None),
        ('invalid', None),
    ],
)
def test_class_names_are_kept(meta, kept):
    converted, _ = convert_checkpoint({'state_dict': timm_state('efficientvim_m1'), 'meta': meta})
    assert converted['meta'].pop('dataset_meta', None) == kept
    assert converted['meta'] == {'source': "a classifier in timm's layout", 'arch': 'm1', 'weights': None}
