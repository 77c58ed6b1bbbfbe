"""Compare the configs of Table C with the paper and with docs/ablations.md."""

import functools
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmevm.analysis import build_without_weights, default_input_size, measure_complexity
from mmevm.models import HSMSSD, NCSSD, MultiHeadHSMSSD, SelfAttention
from mmevm.models.layers import LayerNorm2d

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs' / 'classification'
# Table C: parameters in M, MFLOPs, top-1, images a second.
TABLE_C = {
    'A': ('efficientvim-m2_300e_in1k', 13.9, 355, '75.4', '17,005'),
    'B': ('efficientvim-m3_300e_in1k', 16.6, 656, '77.5', '11,952'),
    'C': ('ablations/efficientvim-m2-nc-ssd_300e_in1k', 13.0, 382, '76.2', '9,786'),
    'D': ('ablations/efficientvim-m2-self-attention_300e_in1k', 13.6, 416, '76.1', '13,038'),
    'E': ('ablations/efficientvim-m2-multi-head_300e_in1k', 13.9, 352, '75.5', '15,703'),
    'F': ('ablations/efficientvim-m2-shared-importance_300e_in1k', 13.9, 352, '75.2', '17,081'),
    'G': ('ablations/efficientvim-m2-fuse-maps_300e_in1k', 13.4, 355, '75.3', '17,041'),
    'H': ('ablations/efficientvim-m2-no-fusion_300e_in1k', 13.0, 354, '75.1', '17,317'),
    'I': ('ablations/efficientvim-m2-states-9-25-49_300e_in1k', 14.0, 407, '75.4', '16,476'),
    'J': ('ablations/efficientvim-m2-states-25-25-25_300e_in1k', 13.9, 373, '75.2', '16,991'),
    'L': ('ablations/efficientvim-m2-bn_300e_in1k', 13.9, 355, 'NaN', '17,432'),
}
LEAVES = {letter: row[0] for letter, row in TABLE_C.items() if row[0].startswith('ablations/')}


@functools.cache
def read(letter):
    return Config.fromfile(CONFIGS / f'{TABLE_C[letter][0]}.py')


@pytest.fixture(scope='module')
def model(letter):
    """Pytest groups the tests of a module-scoped fixture, so only one model is in memory."""
    return build_without_weights(read(letter)).eval()


def with_letters(*arguments):
    return pytest.mark.parametrize(*arguments, scope='module')


def rows_of_the_docs():
    lines = (ROOT / 'docs' / 'ablations.md').read_text(encoding='utf-8').splitlines()
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if '](../configs/' in line]
    return {cells[0][0]: cells for cells in rows if len(cells) > 1}


@with_letters('letter', TABLE_C)
def test_parameters_and_flops_match_paper_and_docs(letter, model):
    name, paper_params, paper_flops, top1, throughput = TABLE_C[letter]
    size, _ = default_input_size(read(letter))
    assert size == (224, 224)
    complexity = measure_complexity(model, (1, 3, *size))
    assert not complexity.unknown
    params, flops = complexity.params / 1e6, complexity.flops / 1e6
    assert params == pytest.approx(paper_params, abs=0.05)  # rounded to 0.1 M

    # LayerNorm is what the paper's count lacks; but for (C), the rest is the paper's to the last digit.
    if letter == 'C':
        assert flops == pytest.approx(paper_flops, rel=0.03)
    else:
        assert round(flops - complexity.by_operator.get('layer_norm', 0) / 1e6) == paper_flops

    _, link, *cells = rows_of_the_docs()[letter]
    assert link == f'[{Path(name).name}](../configs/classification/{name}.py)'
    deviations = [
        f'{round((ours / paper - 1) * 100, 1) + 0:+.1f} %'.replace('-', '−')
        for ours, paper in ((params, paper_params), (flops, paper_flops))
    ]
    assert cells == [
        *(f'{params:.3f}', f'{paper_params:.1f}', deviations[0]),
        *(f'{flops:.1f}', str(paper_flops), deviations[1]),
        *(top1, throughput),
    ]


def test_all_configs_are_in_the_table_and_docs():
    assert set(rows_of_the_docs()) == set(TABLE_C)
    assert {f'ablations/{path.stem}' for path in (CONFIGS / 'ablations').glob('*.py')} == set(LEAVES.values())


@pytest.mark.parametrize('letter', LEAVES)
def test_config_names_its_letter_and_changes_only_the_model(letter):
    path = CONFIGS / f'{LEAVES[letter]}.py'
    assert path.read_text(encoding='utf-8').startswith(f'# Paper, Table C ({letter}): ')
    cfg, base = read(letter).to_dict(), read('A').to_dict()
    model, base_model = cfg.pop('model'), base.pop('model')
    assert cfg == base
    for part in ('backbone', 'head'):
        model.pop(part), base_model.pop(part)
    assert model == base_model


@with_letters(
    ('letter', 'mixer_type'),
    [('A', HSMSSD), ('C', NCSSD), ('D', SelfAttention), ('E', MultiHeadHSMSSD), ('F', MultiHeadHSMSSD), ('J', HSMSSD)],
)
def test_mixers(model, mixer_type):
    mixers = [block.mixer for stage in model.backbone.stages for block in stage.blocks]
    assert [type(mixer) for mixer in mixers] == 6 * [mixer_type]


@with_letters(('letter', 'expected'), [('A', (49, 25, 9)), ('E', (128 // 32, 256 // 32, 512 // 32)), ('F', (1, 1, 1))])
def test_importances_per_token(model, expected):
    mixers = [stage.blocks[0].mixer for stage in model.backbone.stages]
    states = (49, 25, 9)
    importances = [mixer.dw.conv.out_channels - 2 * n for mixer, n in zip(mixers, states, strict=True)]
    assert tuple(importances) == expected


@with_letters(
    ('letter', 'expected'),
    [
        *((letter, [(128, 49), (256, 25), (512, 9), (512, 1, 2)]) for letter in 'AEFL'),
        *((letter, [(512, 1, 2)]) for letter in 'CDH'),
        ('G', [(128, 4, 6), (256, 2, 3), (512, 1, 2)]),
        ('I', [(128, 9), (256, 25), (512, 49), (512, 1, 2)]),
        ('J', [(128, 25), (256, 25), (512, 25), (512, 1, 2)]),
    ],
)
@torch.no_grad()
def test_fusion(model, expected):
    outs = model.extract_feat(torch.randn(1, 3, 64, 96))
    assert [tuple(out.shape[1:]) for out in outs] == expected
    assert model.head(outs).shape == (1, 1000)


@with_letters(('letter', 'layer_norms'), [('A', 6 + 4), ('L', 0)])
def test_norms(model, layer_norms):
    modules = list(model.modules())
    assert sum(isinstance(module, (LayerNorm2d, nn.LayerNorm, nn.GroupNorm)) for module in modules) == layer_norms
    assert sum(isinstance(module, nn.BatchNorm2d) for module in modules) == 4 + 6 * 4 + 2 * 5 + 10 - layer_norms
