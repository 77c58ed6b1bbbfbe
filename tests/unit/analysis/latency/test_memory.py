"""Peak memory of functions with known allocations."""

import functools
import sys

import pytest
from timed_models import MB, allocate, kill_this_process

from mmevm.analysis.latency.memory import peak_cpu_memory

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='measured on Linux only')


def test_peak_memory_is_that_of_the_second_call():
    assert 50 * MB < peak_cpu_memory(functools.partial(allocate, 300 * MB, 50 * MB)) < 110 * MB


def test_peak_memory_raises_errors_of_the_call_and_survives_a_killed_process():
    with pytest.raises(ValueError, match='invalid literal'):
        peak_cpu_memory(functools.partial(int, 'x'))
    with pytest.raises(RuntimeError, match='terminated'):
        peak_cpu_memory(kill_this_process)
