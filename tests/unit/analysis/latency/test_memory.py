"""Peak memory of functions with known allocations, and errors for a lack of memory."""

import functools
import os

import pytest
import torch
from timed_models import MB, allocate, kill_this_process

from mmevm.analysis.latency import memory
from mmevm.analysis.latency.memory import available_memory, is_out_of_memory, limit_memory, peak_cpu_memory

on_linux = pytest.mark.skipif(available_memory() is None, reason='needs /proc')


@on_linux
def test_exceeding_the_available_memory_raises_an_error(monkeypatch):
    monkeypatch.setattr(memory, 'available_memory', lambda: 200 * MB)
    with limit_memory():
        torch.ones(100 * MB // 4)
        with pytest.raises(RuntimeError) as error:
            torch.ones(300 * MB // 4)
    assert is_out_of_memory(error.value)
    torch.ones(300 * MB // 4)


@on_linux
def test_available_memory_is_less_than_the_total():
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
def test_is_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_is_out_of_memory_for_errors_of_onnxruntime():
    state = pytest.importorskip('onnxruntime.capi.onnxruntime_pybind11_state')
    assert is_out_of_memory(state.RuntimeException('Failed to allocate memory for requested buffer of size 8'))
    assert not is_out_of_memory(state.InvalidArgument('Got invalid dimensions for input'))


@on_linux
def test_peak_memory_is_that_of_the_second_call():
    assert 50 * MB < peak_cpu_memory(functools.partial(allocate, 300 * MB, 50 * MB)) < 110 * MB


@on_linux
def test_peak_memory_raises_errors_of_the_call_and_survives_a_killed_process():
    with pytest.raises(ValueError, match='invalid literal'):
        peak_cpu_memory(functools.partial(int, 'x'))
    with pytest.raises(RuntimeError, match='terminated'):
        peak_cpu_memory(kill_this_process)
