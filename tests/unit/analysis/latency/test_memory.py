"""Peak memory of what is known to take some, and memory that does not suffice."""

import functools
import os
import signal

import pytest
import torch

from mmevm.analysis.latency import memory
from mmevm.analysis.latency.memory import MemoryMeter, available_memory, is_out_of_memory, within_available_memory

MB = 10**6
on_linux = pytest.mark.skipif(available_memory() is None, reason='needs /proc')


@on_linux
def test_more_memory_than_is_there_is_an_error_and_not_the_end_of_the_process(monkeypatch):
    monkeypatch.setattr(memory, 'available_memory', lambda: 200 * MB)
    with within_available_memory():
        torch.ones(100 * MB // 4)
        with pytest.raises(RuntimeError) as error:
            torch.ones(300 * MB // 4)
    assert is_out_of_memory(error.value)
    torch.ones(300 * MB // 4)


@on_linux
def test_available_memory_is_less_than_the_machine_has():
    total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    assert 0 < available_memory() < total


@pytest.mark.parametrize(
    ('error', 'expected'),
    [
        (torch.cuda.OutOfMemoryError('CUDA out of memory.'), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError('std::bad_alloc'), True),
        (RuntimeError('mat1 and mat2 shapes cannot be multiplied'), False),
        (ValueError('out of memory'), False),
    ],
)
def test_errors_of_memory_are_told_from_others(error, expected):
    assert is_out_of_memory(error) is expected


def test_onnxruntime_has_errors_of_its_own():
    state = pytest.importorskip('onnxruntime.capi.onnxruntime_pybind11_state')
    assert is_out_of_memory(state.RuntimeException('Failed to allocate memory for requested buffer of size 8'))
    assert not is_out_of_memory(state.InvalidArgument('Got invalid dimensions for input'))


@on_linux
def test_peak_memory_leaves_out_what_only_the_first_call_takes_and_survives_what_fails():
    with MemoryMeter() as meter:
        peak, error = meter.measure(functools.partial(_first_call_takes, 300 * MB, 50 * MB))
        assert 50 * MB < peak < 110 * MB
        assert error is None
        assert meter.measure(functools.partial(int, 'x')) == (
            None,
            "ValueError: invalid literal for int() with base 10: 'x'",
        )
        peak, error = meter.measure(_killed)
        assert peak is None
        assert '-9' in error
        assert meter.measure(functools.partial(_first_call_takes, MB, 50 * MB))[0] > 50 * MB


def _first_call_takes(first, later):
    sizes = iter([first, later])
    return lambda: torch.ones(next(sizes) // 4).sum()


def _killed():
    os.kill(os.getpid(), signal.SIGKILL)
