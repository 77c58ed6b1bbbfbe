"""Breakdowns of models whose parts take known times, and of real ones; bytes and multiply-accumulates by formula."""

import functools
import json
import time

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from mmevm.analysis.complexity import measure_complexity
from mmevm.analysis.latency.breakdown import BETWEEN, CONVOLUTIONS, KINDS, MATRIX_PRODUCTS, OTHER, SOFTMAX, break_down
from mmevm.models import EfficientViM


class Function(nn.Module):
    """A function of a tensor, and of modules, as a module."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x):
        return self.function(self, x)


def sleep(seconds):
    def function(module, x):
        time.sleep(seconds)
        return x + 0

    return Function(function)


def in_sequence(module, x):
    time.sleep(0.03)  # of its own
    return module.third(module.second(module.first(x)))


def by_name(breakdown):
    return {part.label: part for part in breakdown.parts}


@pytest.fixture
def ours():
    return EfficientViM('m1').eval()


@functools.cache
def breakdown_of_ours():
    return break_down(EfficientViM('m1').eval(), torch.rand(2, 3, 64, 64), rounds=5)


def test_shares_are_those_of_known_times():
    model = Function(in_sequence, first=sleep(0.03), second=sleep(0.06), third=sleep(0.12)).eval()
    breakdown = break_down(model, torch.zeros(1), rounds=3)
    itself, first, second, third = (part.milliseconds for part in breakdown.parts)
    assert [part.label for part in breakdown.parts] == ['Function, itself', 'first', 'second', 'third']
    assert itself == pytest.approx(30, rel=0.25)
    assert second / first == pytest.approx(2, rel=0.25)
    assert third / first == pytest.approx(4, rel=0.25)
    assert breakdown.milliseconds == pytest.approx(240, rel=0.25)
    assert breakdown.unobserved == pytest.approx(240, rel=0.25)


def test_a_part_that_is_called_twice_takes_twice_the_time():
    model = Function(lambda m, x: m.other(m.part(m.part(x))), part=sleep(0.03), other=sleep(0.03)).eval()
    breakdown = break_down(model, torch.zeros(1), rounds=3)
    parts = by_name(breakdown)
    assert parts['part'].milliseconds / parts['other'].milliseconds == pytest.approx(2, rel=0.25)
    assert parts['part'].bytes == 2 * parts['other'].bytes == 2 * (4 + 4)


def test_the_times_of_parts_add_up_to_the_whole():
    breakdown = breakdown_of_ours()
    for parts in (breakdown.parts, breakdown.grouped(1), breakdown.grouped(0)):
        assert sum(part.milliseconds for part in parts) == pytest.approx(breakdown.milliseconds)
        assert all(part.milliseconds > 0 for part in parts)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_bytes_and_multiply_accumulates_are_those_of_formulas(dtype):
    parts = dict(conv=nn.Conv2d(4, 6, 3, padding=1, bias=False), linear=nn.Linear(6, 5))
    model = Function(lambda m, x: m.linear(m.conv(x).mean((2, 3))), **parts).eval().to(dtype)
    breakdown = break_down(model, torch.rand(2, 4, 8, 10, dtype=dtype), rounds=1)
    parts = by_name(breakdown)
    assert parts['conv'].flops == 2 * 8 * 10 * 6 * 4 * 9
    assert parts['linear'].flops == 2 * 6 * 5
    assert parts['conv'].bytes == dtype.itemsize * (2 * 8 * 10 * 4 + 2 * 8 * 10 * 6 + 6 * 4 * 9)
    assert parts['linear'].bytes == dtype.itemsize * (2 * 6 + 2 * 5 + 6 * 5 + 5)
    for part in (parts['conv'], parts['linear']):
        arithmetic, memory = part.flops / breakdown.rate * 1e3, part.bytes / breakdown.bandwidth * 1e3
        assert part.floor == pytest.approx(max(arithmetic, memory))
        assert part.bound == ('arithmetic' if arithmetic > memory else 'memory')


def test_what_sets_the_floor():
    def function(m, x):
        return m.depthwise(x).mean() + m.large(x[0, 0]).mean()

    parts = dict(depthwise=nn.Conv2d(8, 8, 1, groups=8), large=nn.Linear(1024, 1024))
    breakdown = break_down(Function(function, **parts).eval(), torch.rand(1, 8, 1024, 1024), rounds=2)
    assert by_name(breakdown)['depthwise'].bound == 'memory'
    assert by_name(breakdown)['large'].bound == 'arithmetic'


def test_the_floor_of_a_matrix_product_is_its_arithmetic_at_the_rate_that_is_stated():
    breakdown = break_down(nn.Sequential(nn.Linear(1024, 1024, bias=False)).eval(), torch.rand(1024, 1024), rounds=2)
    (linear,) = [part for part in breakdown.parts if part.name == '0']
    assert linear.bound == 'arithmetic'
    assert linear.floor == pytest.approx(1e3 * 1024**3 / breakdown.rate)


def test_kinds_of_operations_are_told_apart():
    model = Function(lambda m, x: m.conv(x) @ x.transpose(2, 3), conv=nn.Conv2d(8, 8, 3, padding=1))
    breakdown = break_down(model.eval(), torch.rand(1, 8, 128, 128), rounds=2)
    assert breakdown.kinds[CONVOLUTIONS] > 0
    assert breakdown.kinds[MATRIX_PRODUCTS] > 0
    assert SOFTMAX not in breakdown.kinds
    assert breakdown.mixers == ()
    assert breakdown.mixer_kinds == {}


def test_within_mixers_there_is_what_mixers_do():
    mixer = Function(lambda m, x: F.softmax(x, -1))
    model = Function(lambda m, x: m.conv(m.mixer(x)), mixer=mixer, conv=nn.Conv2d(8, 8, 3, padding=1))
    breakdown = break_down(model.eval(), torch.rand(1, 8, 256, 256), rounds=2)
    assert breakdown.mixers == ('mixer',)
    assert breakdown.mixer_kinds[SOFTMAX] == breakdown.kinds[SOFTMAX] > 0
    assert CONVOLUTIONS not in breakdown.mixer_kinds
    assert breakdown.kinds[CONVOLUTIONS] > 0


def test_what_is_between_operators_is_a_kind_of_its_own():
    model = Function(lambda m, x: m.rest(m.mixer(x)), mixer=sleep(0.06), rest=sleep(0.03)).eval()
    breakdown = break_down(model, torch.zeros(1), rounds=3)
    assert breakdown.mixer_kinds[BETWEEN] == pytest.approx(60, rel=0.25)
    assert breakdown.kinds[BETWEEN] == pytest.approx(90, rel=0.25)


def test_operators_of_unknown_kind_are_named():
    model = Function(lambda m, x: torch.linalg.matrix_exp(x) + x.relu())
    breakdown = break_down(model.eval(), torch.rand(1, 4, 32, 32), rounds=2)
    assert 'aten::linalg_matrix_exp' in breakdown.unknown
    assert 'aten::relu' not in breakdown.unknown
    assert sum(breakdown.unknown.values()) == pytest.approx(breakdown.kinds[OTHER], rel=0.3)
    assert 'aten::linalg_matrix_exp' in breakdown.table()


def test_no_operator_is_of_two_kinds():
    names = [name for names in KINDS.values() for name in names]
    assert len(names) == len(set(names))


STEPS = ('dwconv1', 'norm', 'mixer', 'dwconv2', 'ffn')


def parts_of_ours():
    return {
        'patch_embed',
        *(f'stages.{i}.blocks.{j}.{name}' for i in range(3) for j in range(2) for name in STEPS),
        *(f'stages.{i}.downsample' for i in range(2)),
    }


def test_parts_of_the_backbone_are_the_steps_of_its_blocks(ours):
    breakdown = breakdown_of_ours()
    parts = by_name(breakdown)
    assert parts_of_ours() < set(parts)
    assert {'EfficientViM, itself', 'stages.0, itself', 'stages.0.blocks.1, itself'} < set(parts)
    complexity = measure_complexity(ours, (2, 3, 64, 64))
    assert sum(part.flops for part in breakdown.parts) == complexity.flops
    for name in parts_of_ours():
        assert parts[name].flops == complexity.by_module[name][1], name
    assert breakdown.mixers == tuple(f'stages.{i}.blocks.{j}.mixer' for i in range(3) for j in range(2))
    assert breakdown.mixer_kinds[SOFTMAX] == pytest.approx(breakdown.kinds[SOFTMAX])


def test_the_deployed_backbone_is_broken_down_as_well(ours):
    ours.switch_to_deploy()
    breakdown = break_down(ours, torch.rand(1, 3, 64, 64), rounds=1)
    named = {part.name for part in breakdown.parts if not part.own}
    assert {'patch_embed', 'stages.0.downsample', 'stages.1.downsample'} < named
    assert len(breakdown.mixers) == 6
    assert set(breakdown.mixers) < named
    assert {SOFTMAX, MATRIX_PRODUCTS, BETWEEN} < set(breakdown.mixer_kinds)


def test_other_models_are_broken_down_by_the_same_rule():
    breakdown = break_down(timm.create_model('efficientvim_m1').eval(), torch.rand(1, 3, 64, 64), rounds=1)
    assert parts_of_ours() < {part.name for part in breakdown.parts}
    assert len(breakdown.mixers) == 6


def test_features_of_timm_have_parts_although_their_names_are_flat():
    model = timm.create_model('poolformer_s12', features_only=True).eval()
    breakdown = break_down(model, torch.rand(1, 3, 64, 64), rounds=1)
    assert 'stages_0.blocks.*.token_mixer' in {part.name for part in breakdown.grouped()}
    assert 'stages_*.blocks.*.token_mixer' in {part.name for part in breakdown.grouped(0)}


def test_a_model_within_a_model_is_opened_up(ours):
    model = Function(lambda m, x: m.head(m.backbone(x)[-1]), backbone=ours, head=nn.Conv2d(320, 4, 1)).eval()
    names = {part.name for part in break_down(model, torch.rand(1, 3, 64, 64), rounds=1).parts}
    assert {'backbone.patch_embed', 'backbone.stages.0.blocks.0.mixer', 'head'} < names


def test_groups_are_sums_over_blocks():
    breakdown = breakdown_of_ours()
    for keep, name, stages in ((1, 'stages.0.blocks.*.mixer', [0]), (0, 'stages.*.blocks.*.mixer', [0, 1, 2])):
        (group,) = [part for part in breakdown.grouped(keep) if part.name == name]
        members = [by_name(breakdown)[f'stages.{i}.blocks.{j}.mixer'] for i in stages for j in range(2)]
        for value in ('milliseconds', 'flops', 'bytes', 'floor'):
            assert getattr(group, value) == pytest.approx(sum(getattr(part, value) for part in members)), value


def test_the_table_has_all_groups_and_kinds_and_what_the_machine_can_do():
    breakdown = breakdown_of_ours()
    table = breakdown.table()
    for part in (*breakdown.grouped(1), *breakdown.grouped(0)):
        assert f'\n{part.label} ' in table
    for kind in breakdown.kinds:
        assert f'\n{kind} ' in table
    assert f'{breakdown.rate / 1e9:.1f} GMAC/s' in table
    assert f'{breakdown.bandwidth / 1e9:.1f} GB/s' in table
    assert 'batch of 2' in table


def test_all_of_it_can_be_written_as_json():
    breakdown = breakdown_of_ours()
    read = json.loads(json.dumps(breakdown.as_dict()))
    assert read == breakdown.as_dict()
    assert read['parts'][1]['name'] == 'patch_embed'
    assert read['input_shape'] == [2, 3, 64, 64]
    assert read['kinds'] == breakdown.kinds


def hooks_of(model):
    return [hook for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks) for hook in hooks]


def test_no_hook_remains(ours):
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    break_down(ours, torch.rand(1, 3, 64, 64), rounds=1)
    assert hooks_of(ours) == []
    assert not ours.training
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize('when', range(1, 12))
def test_no_hook_remains_after_an_error_whenever_it_comes(when):
    calls = []

    def function(m, x):
        calls.append(None)
        if len(calls) == when:
            raise RuntimeError('out of order')
        return x + 1

    model = Function(lambda m, x: m.mixer(x), mixer=Function(function)).eval()
    with pytest.raises(RuntimeError, match='out of order'):
        break_down(model, torch.zeros(1), rounds=1)
    assert hooks_of(model) == []


def test_rates_under_autocast_are_those_of_its_dtype():
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    with torch.autocast('cpu', torch.bfloat16):
        assert break_down(model, torch.rand(4, 8), rounds=1).dtype == 'bfloat16'
    assert break_down(model, torch.rand(4, 8), rounds=1).dtype == 'float32'


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match='eval'):
        break_down(EfficientViM('m1').train(), torch.rand(1, 3, 64, 64))


def test_at_least_one_round_is_needed(ours):
    with pytest.raises(ValueError, match='rounds=0'):
        break_down(ours, torch.rand(1, 3, 64, 64), rounds=0)
