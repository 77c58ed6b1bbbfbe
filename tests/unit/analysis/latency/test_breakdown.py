"""Breakdowns of modules with known durations and FLOPs, and of real backbones."""

import functools
import json
import time

import pytest
import timm
import torch
from torch import nn

from mmevm.analysis import measure_complexity
from mmevm.analysis.latency import break_down
from mmevm.analysis.latency.breakdown import OUTSIDE
from mmevm.analysis.operators import (
    CONVOLUTIONS,
    ELEMENTWISE,
    INTERPOLATION,
    LAYOUT,
    MATRIX_PRODUCTS,
    NORMALIZATION,
    OTHER,
    POOLING,
    SOFTMAX,
    operator_group,
)
from mmevm.models import EfficientViM


class Function(nn.Module):
    """A function of a tensor and of submodules."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.function(self, x)


def sleep(seconds):
    def function(module, x):
        time.sleep(seconds)
        return x + 0

    return Function(function)


def parts_of(breakdown):
    return {part.name: part for part in breakdown.parts}


@functools.cache
def breakdown_of_m1():
    return break_down(EfficientViM('m1').eval(), torch.rand(2, 3, 64, 64), rounds=3)


def test_times_are_those_of_known_parts():
    def run(module, x):
        time.sleep(0.05)
        return module.second(module.first(module.first(x)))

    model = Function(run, first=sleep(0.06), unused=sleep(0.1), second=sleep(0.03)).eval()
    breakdown = break_down(model, torch.zeros(1), rounds=3)
    parts = parts_of(breakdown)
    assert [(name, part.self_only) for name, part in parts.items()] == [('', True), ('first', False), ('second', False)]
    tolerance = 25  # ms, for other load on the machine
    for name, milliseconds in {'': 50, 'first': 120, 'second': 30}.items():
        assert milliseconds <= parts[name].groups[OUTSIDE] <= parts[name].milliseconds < milliseconds + tolerance
    for total in (breakdown.milliseconds, breakdown.uninstrumented):
        assert 200 <= total < 200 + 2 * tolerance


def test_flops_and_compute_bound_follow_their_formulas():
    children = dict(conv=nn.Conv2d(4, 6, 3, padding=1, bias=False), linear=nn.Linear(6, 5))
    model = Function(lambda m, x: m.linear(m.conv(x).mean((2, 3))), **children).eval()
    breakdown = break_down(model, torch.rand(2, 4, 8, 10), rounds=1)
    parts = parts_of(breakdown)
    assert parts['conv'].flops == 2 * 8 * 10 * 6 * 4 * 9
    assert parts['linear'].flops == 2 * 6 * 5
    for part in parts.values():
        assert part.compute_bound == pytest.approx(1e3 * part.flops / breakdown.rate)
    assert {CONVOLUTIONS, OUTSIDE} <= set(parts['conv'].groups)
    assert MATRIX_PRODUCTS in parts['linear'].groups
    assert POOLING in parts[''].groups


@pytest.mark.parametrize(
    ('name', 'group'),
    [
        ('aten::addmm', MATRIX_PRODUCTS),
        ('aten::_scaled_dot_product_flash_attention_for_cpu', MATRIX_PRODUCTS),
        ('aten::digamma', ELEMENTWISE),
        ('aten::mkldnn_convolution', CONVOLUTIONS),
        ('aten::_native_batch_norm_legit_no_training', NORMALIZATION),
        ('aten::_softmax', SOFTMAX),
        ('aten::add_', ELEMENTWISE),
        ('aten::hardswish_', ELEMENTWISE),
        ('aten::adaptive_avg_pool2d', POOLING),
        ('aten::upsample_bilinear2d', INTERPOLATION),
        ('aten::transpose', LAYOUT),
        ('aten::_to_copy', LAYOUT),
        ('aten::fft_fft2', OTHER),
        ('prim::PythonOp.Square', OTHER),
    ],
)
def test_operators_are_grouped(name, group):
    assert operator_group(name) == group


def test_operators_without_a_group_are_named():
    model = Function(lambda m, x: torch.linalg.matrix_exp(x) + x.relu())
    breakdown = break_down(model.eval(), torch.rand(1, 4, 32, 32), rounds=2)
    name = 'other: aten::linalg_matrix_exp'
    assert breakdown.parts[0].groups[name] > 0
    assert not [other for other in breakdown.parts[0].groups if 'relu' in other]
    assert name in breakdown.table()


CHILDREN = ('dwconv1', 'norm', 'mixer', 'dwconv2', 'ffn')
PARTS_OF_M1 = {
    'patch_embed',
    *(f'stages.{i}.blocks.{j}.{name}' for i in range(3) for j in range(2) for name in CHILDREN),
    *(f'stages.{i}.downsample' for i in range(2)),
}


def test_parts_of_the_backbone_are_the_steps_of_its_blocks():
    breakdown = breakdown_of_m1()
    parts = parts_of(breakdown)
    assert set(parts) > PARTS_OF_M1
    assert {name for name, part in parts.items() if part.self_only} >= {'', 'stages.0', 'stages.0.blocks.1'}
    complexity = measure_complexity(EfficientViM('m1'), (2, 3, 64, 64))
    assert sum(part.flops for part in breakdown.parts) == complexity.flops
    for name in PARTS_OF_M1:
        assert parts[name].flops == complexity.by_module[name][1], name
        assert parts[name].groups.get(SOFTMAX, 0) > 0 if name.endswith('mixer') else SOFTMAX not in parts[name].groups


def test_grouped_parts_are_sums_over_blocks():
    breakdown = breakdown_of_m1()
    (mixers,) = [part for part in breakdown.grouped() if part.name == 'stages.*.blocks.*.mixer']
    members = [part for part in breakdown.parts if part.name.endswith('.mixer')]
    assert len(members) == 6
    for value in ('milliseconds', 'flops', 'compute_bound'):
        assert getattr(mixers, value) == pytest.approx(sum(getattr(part, value) for part in members))
    assert sum(part.milliseconds for part in breakdown.grouped()) == pytest.approx(breakdown.milliseconds)


def test_table_lists_parts_and_operator_groups():
    breakdown = breakdown_of_m1()
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in breakdown.table().splitlines() if '|' in line]
    shown = {row[0]: row[1:] for row in rows}
    for part in breakdown.grouped():
        name = f'{part.name or "model"}{" (self)" if part.self_only else ""}'
        assert shown[name][0] == f'{part.milliseconds:.3f}'
        assert shown[name][2] == f'{part.flops / 1e6:.1f}'
    assert shown['sum'][0] == f'{breakdown.milliseconds:.3f}'
    assert shown[SOFTMAX][0] == shown[SOFTMAX][2]  # all softmax is in token mixers
    assert 'batch of 2' in breakdown.table()
    assert f'{breakdown.rate / 1e9:.1f} GMAC/s' in breakdown.table()


def test_breakdown_can_be_written_as_json():
    written = json.loads(json.dumps(breakdown_of_m1().as_dict()))
    assert written['input_shape'] == [2, 3, 64, 64]
    assert written['parts'][1]['name'] == 'patch_embed'
    assert written['parts'][1]['groups'] == breakdown_of_m1().parts[1].groups


def test_deployed_wrapped_and_timm_models_are_split_up_too():
    deployed = EfficientViM('m1').eval()
    deployed.switch_to_deploy()
    model = Function(lambda m, x: m.head(m.backbone(x)[-1]), backbone=deployed, head=nn.Conv2d(320, 4, 1)).eval()
    names = set(parts_of(break_down(model, torch.rand(1, 3, 64, 64), rounds=1)))
    assert {'backbone.patch_embed', 'backbone.stages.0.blocks.0.mixer', 'head'} < names
    model = timm.create_model('poolformer_s12', features_only=True).eval()
    names = {part.name for part in break_down(model, torch.rand(1, 3, 64, 64), rounds=1).grouped()}
    assert 'stages_*.blocks.*.token_mixer' in names


def hooks_of(model):
    return [hook for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks) for hook in hooks]


@pytest.mark.parametrize('failing_call', [None, 1, 2, 4, 6])
def test_no_hook_remains(failing_call):
    calls = []

    def function(m, x):
        calls.append(None)
        if len(calls) == failing_call:
            raise RuntimeError('failure in a forward pass')
        return x + 1

    model = Function(lambda m, x: m.mixer(x), mixer=Function(function)).eval()
    if failing_call is None:
        break_down(model, torch.zeros(1), rounds=1)
    else:
        with pytest.raises(RuntimeError, match='failure in a forward pass'):
            break_down(model, torch.zeros(1), rounds=1)
    assert hooks_of(model) == []


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match='eval'):
        break_down(EfficientViM('m1').train(), torch.rand(1, 3, 64, 64))
