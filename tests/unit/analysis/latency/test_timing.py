"""Timing, interleaving and warm-up of calls with known durations."""

import functools
import time

import pytest

from mmevm.analysis.latency.timing import interleave, is_warm, time_call, warm_up


def test_interleave_calls_each_once_per_round_in_shuffled_order():
    calls, rounds_done = [], []
    seconds, errors = interleave(
        {name: functools.partial(calls.append, name) for name in 'abcd'}, 20, after_round=rounds_done.append
    )
    rounds = [tuple(calls[i : i + 4]) for i in range(0, 80, 4)]
    assert {tuple(sorted(order)) for order in rounds} == {tuple('abcd')}
    assert len(set(rounds)) > 5
    assert {order[0] for order in rounds} == set('abcd')
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys('abcd', 20)
    assert not errors
    assert rounds_done == list(range(1, 21))


def test_interleave_continues_after_one_call_fails():
    calls = []

    def fail_the_third_time(name):
        calls.append(name)
        if name == 'bad' and calls.count(name) == 3:
            raise ArithmeticError

    seconds, errors = interleave({name: functools.partial(fail_the_third_time, name) for name in ('good', 'bad')}, 5)
    assert len(seconds.pop('good')) == 5
    assert not seconds
    assert isinstance(errors['bad'], ArithmeticError)
    assert calls.count('bad') == 3


@pytest.mark.parametrize(
    ('seconds', 'warm'),
    [
        ([], False),
        ([1.0, 1.0], False),
        ([9, 1, 1], False),
        ([9, 1, 1, 1], True),
        ([1, 1, 1], True),
        ([1, 1, 0.96], False),
        ([1, 1, 0.98], True),
        ([8, 4, 2, 1], False),
        ([2, 2, 1, 2], False),
        ([1, 2, 3, 4], True),
        ([5, 1, 5, 5, 5, 5], True),  # other load on the machine
        ([0.99**i for i in range(40)], False),
    ],
)
def test_is_warm_when_calls_stop_becoming_faster(seconds, warm):
    assert is_warm(seconds) is warm


def test_warm_up_continues_until_slow_first_calls_are_over():
    pauses = iter([0.2, 0.1, 0.1])
    seconds, warm = warm_up(lambda: time.sleep(next(pauses, 0.02)), min_seconds=0)
    assert warm
    assert len(seconds) >= 8  # the earlier half must contain a fast call
    assert sum(seconds) >= 0.4 + 5 * 0.02


def test_warm_up_respects_its_minimum_and_maximum_duration():
    start = time.perf_counter()
    seconds, warm = warm_up(lambda: time.sleep(0.001), min_seconds=0.2)
    assert warm
    assert len(seconds) > 20
    assert time.perf_counter() - start >= 0.2
    pause = iter(0.8**i / 10 for i in range(1000))
    seconds, warm = warm_up(lambda: time.sleep(next(pause)), min_seconds=0, max_seconds=0.2)
    assert not warm
    assert sum(seconds[:-1]) < 0.2
    assert sum(seconds) > 0.15


def test_freeing_outputs_is_not_timed():
    class SlowToFree:
        def __del__(self):
            time.sleep(0.3)

    assert time_call(SlowToFree) < 0.3
