"""Measure the peak memory of a call on the CPU."""

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn


def peak_cpu_memory(make_call: Callable[[], Callable[[], Any]]) -> int | None:
    """Measure the bytes of weights, batch and activations in a process of its own; None if the system is not Linux.

    They are the resident bytes at the peak of the second call, less those before the model was built. ``make_call``
    builds the model and returns the function to call. It must be picklable.
    """
    if sys.platform != 'linux':
        return None
    # not 'spawn': the peak of a new program includes that of the process that started it
    context = get_context('forkserver')
    context.set_forkserver_preload(['mmevm.analysis.latency'])  # imports once for all measurements
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_of_this_process, make_call, torch.get_num_threads()).result()


def _peak_of_this_process(make_call: Callable[[], Callable[[], Any]], threads: int) -> int:
    from resource import RUSAGE_SELF, getrusage  # Unix only

    torch.set_num_threads(threads)
    nn.Conv2d(8, 8, 3)(torch.ones(1, 8, 16, 16))  # load the libraries
    before = getrusage(RUSAGE_SELF).ru_maxrss
    call = make_call()
    call()
    Path('/proc/self/clear_refs').write_text('5')  # reset the peak
    call()
    return 1024 * (getrusage(RUSAGE_SELF).ru_maxrss - before)
