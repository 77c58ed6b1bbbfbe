"""Measure the peak memory of a call on the CPU."""

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import nn


def peak_cpu_memory(make_call: Callable[[], Callable[[], Any]]) -> int | None:
    """Measure the memory to build a model and to call it twice, in a process of its own.

    Args:
        make_call: Builds the model and returns the function to call. It must be picklable.

    Returns:
        Bytes by which the peak of the process rises: weights, batch and activations. None if the system is not Linux.
    """
    if sys.platform != 'linux':
        return None
    # not spawn, as Linux starts the peak of a spawned process at that of its parent
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
    call()
    return 1024 * (getrusage(RUSAGE_SELF).ru_maxrss - before)
