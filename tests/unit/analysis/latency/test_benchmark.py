"""Rows: times against a stopwatch, settings, halved batches and memory, with models made for that."""

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from mmevm.analysis.complexity import measure_complexity
from mmevm.analysis.latency import ModelSpec, benchmark, memory, relative_times
from mmevm.analysis.latency.benchmark import Setting, build, default_batch_size
from mmevm.analysis.latency.timing import warm_up
from mmevm.models import EfficientViM

MB = 10**6
on_linux = pytest.mark.skipif(memory.available_memory() is None, reason='needs /proc')


@dataclass(frozen=True)
class StandIn(ModelSpec):
    """Any module under any name, never deployed."""

    module: Callable[[], nn.Module] = nn.Identity

    def __post_init__(self):
        pass

    def build(self):
        return self.module()

    def deploy(self, model):
        return model


class Does(nn.Module):
    """A model that does what a function of its input does."""

    def __init__(self, action):
        super().__init__()
        self.action = action
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        self.action(x)
        return x * self.weight


class Sleep(Does):
    def __init__(self, seconds):
        super().__init__(lambda x: time.sleep(seconds))


class Takes200MB(nn.Module):
    """Half of it as a weight, half of it while it is called."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(100 * MB // 4))

    def forward(self, x):
        return self.weight + 1


def stand_in(name, action):
    return StandIn(name, module=lambda: Does(action))


def measure(*subjects, **kwargs):
    """Rows at the least cost: 8×8, one image, two rounds and no memory."""
    kwargs = dict(resolutions=[8], batch_sizes=[1], rounds=2, memory=False) | kwargs
    return list(benchmark(subjects, **kwargs))


def test_times_are_those_of_a_stopwatch():
    short, long = measure(
        *(StandIn(str(s), module=functools.partial(Sleep, s)) for s in (0.02, 0.04)), batch_sizes=[2], rounds=15
    )
    stopwatch = {}
    for seconds in (0.02, 0.04):
        model, times = Sleep(seconds), []
        for _ in range(15):
            start = time.perf_counter()
            model(torch.randn(2, 3, 8, 8))
            times.append(time.perf_counter() - start)
        stopwatch[seconds] = statistics.median(times)
    for row, seconds in [(short, 0.02), (long, 0.04)]:
        assert len(row.seconds) == 15
        assert 1e3 * seconds / 2 <= row.milliseconds == pytest.approx(1e3 * stopwatch[seconds] / 2, abs=2)
    assert relative_times([short, long], '0.02')[1] == pytest.approx(2, rel=0.1)


def test_a_row_says_that_its_warm_up_was_cut_short(monkeypatch):
    pause = iter(0.5 ** (i / 4) / 50 for i in range(1000))
    monkeypatch.setattr(warm_up, '__defaults__', ('cpu', 0.0, 0.05))
    (row,) = measure(stand_in('slowly', lambda x: time.sleep(next(pause))))
    assert 'still becoming faster' in ' '.join(row.notes)
    assert len(row.seconds) == 2


def test_a_model_that_fails_is_a_row_that_says_why():
    def fail(x):
        raise NotImplementedError('no such thing\nand more')

    good, bad = measure(stand_in('good', lambda x: None), stand_in('bad', fail))
    assert bad.error == 'NotImplementedError: no such thing'
    assert (bad.seconds, bad.milliseconds, bad.peak_memory) == ([], None, None)
    assert 'FLOPs not counted: NotImplementedError' in bad.notes[0]
    assert bad.params == 1
    assert (good.error, len(good.seconds)) == (None, 2)


def test_what_a_form_for_inference_leaves_is_noted():
    subject = StandIn('normed', module=lambda: nn.BatchNorm2d(3))
    (row,) = measure(subject)
    assert '1 BatchNorms are left in its form for inference' in row.notes
    assert 'BatchNorms' not in ' '.join(note for row in measure(subject, deploy=False) for note in row.notes)
    assert 'BatchNorms' not in ' '.join(
        note for row in measure(ModelSpec('m1'), resolutions=[32]) for note in row.notes
    )


def test_a_batch_that_does_not_fit_is_halved_until_it_does():
    batches = []

    def take_three(x):
        batches.append(len(x))
        if len(x) > 3:
            raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate more')
        time.sleep(0.01 * len(x))

    subjects = stand_in('small', take_three), stand_in('large', lambda x: time.sleep(0.08))
    small, large = measure(*subjects, batch_sizes=[8])
    assert list(dict.fromkeys(batches)) == [1, 8, 4, 2]  # first one image, whose FLOPs are counted
    assert (small.batch_size, small.asked_batch_size, small.error) == (2, 8, None)
    assert (large.batch_size, large.asked_batch_size) == (8, None)
    assert relative_times([small, large], 'large')[0] == pytest.approx(1, rel=0.5)  # of an image


@on_linux
def test_what_no_batch_fits_is_a_row_of_the_allocator_s_words():
    (row,) = measure(stand_in('endless', lambda x: torch.empty(len(x), 2**46)), batch_sizes=[4])
    assert row.batch_size == 1
    assert "can't allocate memory" in row.error
    assert not row.seconds


@on_linux
def test_a_batch_of_more_memory_than_is_there_is_halved_too(monkeypatch):
    monkeypatch.setattr(memory, 'available_memory', lambda: 200 * MB)
    (row,) = measure(stand_in('large', lambda x: torch.ones(len(x) * 150 * MB // 4)), batch_sizes=[4])
    assert (row.batch_size, row.asked_batch_size) == (1, 4)


@on_linux
def test_peak_memory_is_that_of_weights_and_of_a_call():
    (row,) = measure(StandIn('200 MB', module=Takes200MB), memory=True)
    assert 200 * MB < row.peak_memory < 260 * MB
    assert (row.error, row.notes) == (None, [])


def test_there_is_a_row_for_each_combination_in_settings_that_go_together():
    rows = measure(
        *(stand_in(name, lambda x: time.sleep(0.01)) for name in 'ab'),
        resolutions=[8, 16],
        batch_sizes=[1, 2],
        dtypes=['float32', 'bfloat16'],
    )
    assert [(row.resolution, row.dtype, row.batch_size, row.model) for row in rows] == [
        (resolution, dtype, batch, name)
        for resolution in (8, 16)
        for dtype in ('float32', 'bfloat16')
        for batch in (1, 2)
        for name in 'ab'
    ]
    assert all(row.engine == 'eager' and row.deployed and row.channels_last for row in rows)


@pytest.mark.parametrize('channels_last', [False, True])
def test_models_get_the_same_images_as_the_setting_has_them(channels_last):
    seen = {'a': [], 'b': []}
    measure(
        *(stand_in(name, images.append) for name, images in seen.items()),
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


def test_threads_are_as_asked_while_it_runs_and_as_before_afterwards():
    before = torch.get_num_threads()
    seen = []
    measure(stand_in('a', lambda x: seen.append(torch.get_num_threads())), threads=before + 2)
    assert set(seen) == {before + 2}
    assert torch.get_num_threads() == before


def test_parameters_and_flops_are_those_of_one_image_before_deployment():
    (row,) = measure('m1', resolutions=[64], batch_sizes=[2])
    complexity = measure_complexity(EfficientViM('m1'), (1, 3, 64, 64))
    assert (row.params, row.flops) == (complexity.params, complexity.flops)
    assert row.deployed


@pytest.mark.parametrize('deploy', [False, True])
def test_ours_has_the_form_that_was_asked_for(deploy):
    model, x = build(ModelSpec('m1'), Setting(64, 2, deploy=deploy))
    assert model.deploy is deploy
    assert not model.training
    assert tuple(x.shape) == (2, 3, 64, 64)


@pytest.mark.parametrize('name', ['m1', 'efficientvim_m1'])
def test_a_model_in_training_has_its_batch_norms_in_eval_mode(name):
    model, _ = build(ModelSpec(name, with_cp=True), Setting(64, 1, training=True, deploy=True))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    others = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.training for m in [model, *others])
    if name == 'm1':
        assert all(stage.with_cp for stage in model.stages)


def test_training_times_the_backward_pass_as_well():
    class SlowBackward(Does):
        def forward(self, x):
            out = x * self.weight
            out.register_hook(lambda grad: time.sleep(0.03))
            return out

    (row,) = measure(StandIn('slow', module=lambda: SlowBackward(None)), training=True, memory=False)
    assert row.milliseconds > 30
    assert row.training
    assert not row.deployed


def test_progress_goes_from_nothing_towards_all():
    shares = []
    measure(
        *(stand_in(name, lambda x: None) for name in 'ab'),
        resolutions=[8, 16],
        rounds=3,
        progress=lambda text, share: shares.append(share),
    )
    assert len(shares) == 2 * 2 * (1 + 3)  # of each row its warm-up and its turns
    assert shares == pytest.approx([i / 16 for i in range(16)])


@pytest.mark.parametrize(
    ('device', 'resolution', 'expected'),
    [('cpu', 512, 16), ('cuda', 512, 256), ('cpu', 224, 16), ('cpu', 1024, 4), ('cpu', 4096, 1), ('cuda', 4096, 4)],
)
def test_large_images_come_in_batches_of_as_many_pixels(device, resolution, expected):
    assert default_batch_size(device, resolution) == expected


@pytest.mark.parametrize(
    ('wrong', 'sentence'),
    [
        (dict(rounds=0), 'rounds'),
        (dict(resolutions=[64, 0]), 'resolutions'),
        (dict(batch_sizes=[-1]), 'batch_sizes'),
        (dict(dtypes=['half']), 'half is none of float32'),
        (dict(engines=['tensorrt']), 'tensorrt is none of eager'),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        measure(stand_in('a', lambda x: None), **wrong)
