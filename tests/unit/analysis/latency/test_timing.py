"""The clock, its turns and its warm-up, with calls made for that."""

import functools
import time

import pytest

from mmevm.analysis.latency.timing import interleave, is_warm, time_call, warm_up


def test_each_has_one_turn_in_a_round_and_the_order_changes():
    calls, steps = [], []
    seconds, errors = interleave(
        {name: functools.partial(calls.append, name) for name in 'abcd'},
        20,
        after_call=lambda: steps.append(len(calls)),
    )
    rounds = [tuple(calls[i : i + 4]) for i in range(0, 80, 4)]
    assert {tuple(sorted(order)) for order in rounds} == {tuple('abcd')}
    assert len(set(rounds)) > 5
    assert {order[0] for order in rounds} == set('abcd')
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys('abcd', 20)
    assert not errors
    assert steps == list(range(1, 81))


def test_what_fails_in_a_later_round_does_not_stop_the_others():
    calls = []

    def fail_at_the_third(name):
        calls.append(name)
        if name == 'bad' and calls.count(name) == 3:
            raise ArithmeticError

    seconds, errors = interleave({name: functools.partial(fail_at_the_third, name) for name in ('good', 'bad')}, 5)
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
        ([5, 1, 5, 5, 5, 5], True),  # an outlier of the machine slows a call down, and says nothing
        ([0.99**i for i in range(40)], False),
    ],
)
def test_warm_is_what_has_stopped_becoming_faster(seconds, warm):
    assert is_warm(seconds) is warm


def test_warm_up_calls_until_the_first_slow_calls_are_over():
    pauses = iter([0.2, 0.1, 0.1])
    seconds, warm = warm_up(lambda: time.sleep(next(pauses, 0.02)), at_least=0)
    assert warm
    assert len(seconds) >= 8  # the first whose earlier half has a quick one too
    assert sum(seconds) >= 0.4 + 5 * 0.02


def test_warm_up_of_quick_calls_lasts_a_while_and_never_for_ever():
    start = time.perf_counter()
    seconds, warm = warm_up(lambda: time.sleep(0.001), at_least=0.2)
    assert warm
    assert len(seconds) > 20
    assert time.perf_counter() - start >= 0.2
    pause = iter(0.8**i / 10 for i in range(1000))
    seconds, warm = warm_up(lambda: time.sleep(next(pause)), at_least=0, at_most=0.2)
    assert not warm
    assert sum(seconds[:-1]) < 0.2
    assert sum(seconds) > 0.15


def test_the_clock_stands_while_outputs_are_thrown_away():
    class SlowToGo:
        def __del__(self):
            time.sleep(0.3)

    assert time_call(SlowToGo) < 0.3
