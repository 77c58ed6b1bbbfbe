"""Breakdowns of modules with known durations and FLOPs, and of real backbones."""

import functools
import json
import time
from dataclasses import asdict

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
    assert list(parts) == ['', 'first', 'second']
    tolerance = 25  # ms, for other load on the machine
    for name, milliseconds in {'': 50, 'first': 120, 'second': 30}.items():
        assert milliseconds <= parts[name].groups[OUTSIDE] <= parts[name].milliseconds < milliseconds + tolerance
    for total in (breakdown.milliseconds, breakdown.uninstrumented):
        assert 200 <= total < 200 + 2 * tolerance


def test_flops_and_groups_are_those_of_known_parts():
    children = dict(conv=nn.Conv2d(4, 6, 3, padding=1, bias=False), linear=nn.Linear(6, 5))
    model = Function(lambda m, x: m.linear(m.conv(x).mean((2, 3))), **children).eval()
    breakdown = break_down(model, torch.rand(2, 4, 8, 10), rounds=1)
    parts = parts_of(breakdown)
    assert parts['conv'].flops == 2 * 8 * 10 * 6 * 4 * 9
    assert parts['linear'].flops == 2 * 6 * 5
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


def test_parts_of_the_backbone_are_the_steps_of_its_blocks():
    breakdown = breakdown_of_m1()
    parts = parts_of(breakdown)
    blocks = {f'stages.*.blocks.*.{name}' for name in ('dwconv1', 'mixer', 'dwconv2', 'ffn')}
    assert set(parts) >= {'', 'patch_embed', 'stages.*', 'stages.*.blocks.*', 'stages.*.downsample', *blocks}
    complexity = measure_complexity(EfficientViM('m1'), (2, 3, 64, 64))
    assert sum(part.flops for part in breakdown.parts) == complexity.flops
    mixers = [flops for name, (_, flops) in complexity.by_module.items() if name.endswith('.mixer')]
    assert len(mixers) == 6
    assert parts['stages.*.blocks.*.mixer'].flops == sum(mixers)
    assert parts['patch_embed'].flops == complexity.by_module['patch_embed'][1]
    for name, part in parts.items():
        assert (part.groups.get(SOFTMAX, 0) > 0) == name.endswith('.mixer')


def test_table_lists_parts_and_operator_groups():
    breakdown = breakdown_of_m1()
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in breakdown.table().splitlines() if '|' in line]
    shown = {row[0]: row[1:] for row in rows}
    for part in breakdown.parts:
        share = f'{part.milliseconds / breakdown.milliseconds:.1%}'
        assert shown[part.name or 'model'] == [f'{part.milliseconds:.3f}', share, f'{part.flops / 1e6:.1f}']
    assert shown['sum'][0] == f'{breakdown.milliseconds:.3f}'
    assert shown[SOFTMAX][0] == f'{parts_of(breakdown)["stages.*.blocks.*.mixer"].groups[SOFTMAX]:.3f}'
    assert 'batch of 2' in breakdown.table()


def test_breakdown_can_be_written_as_json():
    written = json.loads(json.dumps(asdict(breakdown_of_m1())))
    assert written['input_shape'] == [2, 3, 64, 64]
    assert written['parts'][1]['name'] == 'patch_embed'
    assert written['parts'][1]['groups'] == breakdown_of_m1().parts[1].groups


def test_deployed_wrapped_and_timm_models_are_split_up_too():
    deployed = EfficientViM('m1').eval()
    deployed.switch_to_deploy()
    model = Function(lambda m, x: m.head(m.backbone(x)[-1]), backbone=deployed, head=nn.Conv2d(320, 4, 1)).eval()
    names = set(parts_of(break_down(model, torch.rand(1, 3, 64, 64), rounds=1)))
    assert {'backbone.patch_embed', 'backbone.stages.*.blocks.*.mixer', 'head'} < names
    model = timm.create_model('poolformer_s12', features_only=True).eval()
    names = {part.name for part in break_down(model, torch.rand(1, 3, 64, 64), rounds=1).parts}
    assert 'stages_*.blocks.*.token_mixer' in names


def hooks_of(model):
    return [hook for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks) for hook in hooks]


@pytest.mark.parametrize('failing_call', [None, 1, 2, 3, 4])
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
