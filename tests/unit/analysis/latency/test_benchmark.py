"""Rows of a benchmark: known durations, settings, halved batches and memory."""

import functools
import itertools
import statistics
import sys
import time

import pytest
import torch
from timed_models import MB, CustomSpec, Does, Sleep, Takes200MB
from torch import nn

from mmevm.analysis import measure_complexity
from mmevm.analysis.latency import ModelSpec, Setting, benchmark, build, relative_times
from mmevm.analysis.latency.benchmark import default_batch_size
from mmevm.analysis.latency.timing import warm_up
from mmevm.models import EfficientViM

on_linux = pytest.mark.skipif(sys.platform != 'linux', reason='measured on Linux only')


def custom(name, action):
    return CustomSpec(name, module=lambda: Does(action))


def measure(*specs, resolutions=(8,), batch_sizes=(1,), dtypes=('float32',), rounds=2, memory=False, **kwargs):
    """Rows with the cheapest settings: one image of 8×8, two rounds, no memory."""
    how = {key: kwargs.pop(key) for key in ('engines', 'progress') if key in kwargs}
    settings = [Setting(*values, **kwargs) for values in itertools.product(resolutions, batch_sizes, dtypes)]
    return list(benchmark(specs, settings, rounds=rounds, memory=memory, **how))


def test_times_equal_those_of_a_stopwatch():
    durations = (0.02, 0.04)
    specs = [CustomSpec(str(seconds), module=functools.partial(Sleep, seconds)) for seconds in durations]
    rows = measure(*specs, batch_sizes=[2], rounds=15)
    for row, seconds in zip(rows, durations, strict=True):
        model, times = Sleep(seconds), []
        for _ in range(15):
            start = time.perf_counter()
            model(torch.randn(2, 3, 8, 8))
            times.append(time.perf_counter() - start)
        assert len(row.seconds) == 15
        assert 1e3 * seconds / 2 <= row.milliseconds == pytest.approx(1e3 * statistics.median(times) / 2, abs=2)
    assert relative_times(rows, '0.02')[1] == pytest.approx(2, rel=0.1)


def test_unfinished_warm_up_is_noted(monkeypatch):
    pause = iter(0.5 ** (i / 4) / 50 for i in range(1000))
    monkeypatch.setattr(warm_up, '__defaults__', ('cpu', 0.0, 0.05))
    (row,) = measure(custom('slow', lambda x: time.sleep(next(pause))))
    assert 'still getting faster' in ' '.join(row.notes)
    assert len(row.seconds) == 2


def test_a_failing_model_is_reported_in_its_row():
    def fail(x):
        raise NotImplementedError('no such thing\nand more')

    good, bad = measure(custom('good', lambda x: None), custom('bad', fail))
    assert bad.error == 'NotImplementedError: no such thing'
    assert (bad.seconds, bad.milliseconds, bad.peak_memory) == ([], None, None)
    assert 'FLOPs not counted: NotImplementedError' in bad.notes[0]
    assert bad.params == 1
    assert (good.error, len(good.seconds)) == (None, 2)


def test_a_batch_that_does_not_fit_is_halved():
    batches = []

    def accept_three(x):
        batches.append(len(x))
        if len(x) > 3:
            raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate more')
        time.sleep(0.01 * len(x))

    small, large = measure(custom('small', accept_three), custom('large', lambda x: time.sleep(0.08)), batch_sizes=[8])
    assert list(dict.fromkeys(batches)) == [1, 8, 4, 2]  # first one image, to count FLOPs
    assert (small.batch_size, small.asked_batch_size, small.error) == (2, 8, None)
    assert (large.batch_size, large.asked_batch_size) == (8, None)
    assert relative_times([small, large], 'large')[0] == pytest.approx(1, rel=0.5)  # per image


@on_linux
def test_peak_memory_includes_weights_and_activations():
    (row,) = measure(CustomSpec('200 MB', module=Takes200MB), memory=True)
    assert 200 * MB < row.peak_memory < 260 * MB
    assert (row.error, row.notes) == (None, [])


def test_there_is_a_row_for_each_combination_ordered_by_setting():
    rows = measure(
        *(custom(name, lambda x: time.sleep(0.01)) for name in 'ab'),
        resolutions=[8, 16],
        batch_sizes=[1, 2],
        dtypes=['float32', 'bfloat16'],
    )
    assert [(row.resolution, row.batch_size, row.dtype, row.model) for row in rows] == [
        (resolution, batch, dtype, name)
        for resolution in (8, 16)
        for batch in (1, 2)
        for dtype in ('float32', 'bfloat16')
        for name in 'ab'
    ]
    assert all(row.engine == 'eager' and row.deployed and row.channels_last for row in rows)


def test_dtypes_and_models_of_one_size_are_interleaved():
    order = []
    specs = [custom(name, lambda x, name=name: order.append((name, str(x.dtype)))) for name in 'ab']
    measure(*specs, dtypes=['float32', 'bfloat16'], rounds=5)
    rounds = [set(order[i : i + 4]) for i in range(len(order) - 20, len(order), 4)]
    assert all(len(each) == 4 for each in rounds)


def test_images_need_not_be_square():
    shapes = set()
    (row,) = measure(custom('a', lambda x: shapes.add(tuple(map(int, x.shape)))), width=24, batch_sizes=[2])
    assert shapes == {(1, 3, 8, 24), (2, 3, 8, 24)}  # the first to count FLOPs
    assert row.size == '8×24'


@pytest.mark.parametrize('channels_last', [False, True])
def test_all_models_get_the_same_images_in_the_requested_format(channels_last):
    seen = {'a': [], 'b': []}
    measure(
        *(custom(name, images.append) for name, images in seen.items()),
        resolutions=[32],
        batch_sizes=[4],
        dtypes=['bfloat16'],
        channels_last=channels_last,
    )
    a, b = (images[-1] for images in seen.values())
    assert torch.equal(a, b)
    assert (tuple(a.shape), a.dtype) == ((4, 3, 32, 32), torch.bfloat16)
    assert a.is_contiguous(memory_format=torch.channels_last) is channels_last
    assert a.float().mean().abs() < 0.05  # normal noise
    assert a.float().std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize('channels_last', [False, True])
def test_maps_of_the_backbone_have_the_requested_format(channels_last):
    setting = Setting(64, 1, 'float32', 'cpu', channels_last=channels_last)
    model, x = build(ModelSpec('m1@trained'), setting)
    assert model(x)[0].is_contiguous(memory_format=torch.channels_last) is channels_last


def test_parameters_and_flops_are_those_of_one_image_before_deploy_mode():
    (row,) = measure('m1', resolutions=[64], batch_sizes=[2])
    complexity = measure_complexity(EfficientViM('m1'), (1, 3, 64, 64))
    assert (row.params, row.flops) == (complexity.params, complexity.flops)
    assert row.deployed


@pytest.mark.parametrize('deploy', [False, True])
def test_build_switches_to_deploy_mode(deploy):
    model, x = build(ModelSpec('m1'), Setting(64, 2, deploy=deploy))
    assert model.deploy is deploy
    assert not model.training
    assert tuple(x.shape) == (2, 3, 64, 64)


@pytest.mark.parametrize('name', ['m1', 'efficientvim_m1'])
def test_build_for_training_keeps_batch_norms_in_eval_mode(name):
    model, _ = build(ModelSpec(name), Setting(64, 1, training=True, deploy=True))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert all(m.training for m in [model, *model.modules()] if not isinstance(m, nn.BatchNorm2d))


def test_training_includes_the_backward_pass():
    class SlowBackward(Does):
        def forward(self, x):
            out = x * self.weight
            out.register_hook(lambda grad: time.sleep(0.03))
            return out

    (row,) = measure(CustomSpec('slow', module=lambda: SlowBackward(None)), training=True)
    assert row.milliseconds > 30
    assert row.training
    assert not row.deployed


def test_progress_reports_warm_ups_and_rounds():
    texts = []
    measure(custom('a', lambda x: None), custom('b', lambda x: None), rounds=3, progress=texts.append)
    setting = '8×8, batch 1: '
    steps = ['warm-up of a, eager, float32', 'warm-up of b, eager, float32', *(f'round {i} of 3' for i in (1, 2, 3))]
    assert texts == [setting + step for step in steps]


@pytest.mark.parametrize(
    ('device', 'resolution', 'expected'),
    [('cpu', 512, 16), ('cuda', 512, 256), ('cpu', 224, 16), ('cpu', 1024, 4), ('cpu', 4096, 1), ('cuda', 4096, 4)],
)
def test_default_batches_of_large_images_have_as_many_pixels(device, resolution, expected):
    assert default_batch_size(device, resolution, resolution) == expected
    assert default_batch_size(device, resolution // 2, resolution * 2) == expected


def test_unknown_names_are_reported():
    with pytest.raises(ValueError, match='m5 is not a model'):
        measure('m5')
    (row,) = measure(custom('a', lambda x: None), engines=['tensorrt'])
    assert "EngineError: engine='tensorrt' is not one of eager" in row.error
