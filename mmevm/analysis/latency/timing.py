"""Time calls: warm-up, synchronization and interleaving."""

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def enlarge_kernel_cache() -> None:
    """Let oneDNN cache the kernels of all interleaved models; the default of 1024 makes them evict each other.

    Call it at the start of a process: oneDNN reads the setting with its first kernel.
    """
    os.environ.setdefault('ONEDNN_PRIMITIVE_CACHE_CAPACITY', '65536')


def is_cuda(device: str | torch.device) -> bool:
    """Return whether a device is a CUDA GPU."""
    return torch.device(device).type == 'cuda'


def synchronize(device: str | torch.device) -> None:
    """Wait for all work queued on a GPU; do nothing for a CPU."""
    if is_cuda(device):
        torch.cuda.synchronize(device)


def time_call(call: Callable[[], Any], device: str | torch.device = 'cpu') -> float:
    """Return the seconds of one call, including the device's work."""
    synchronize(device)
    start = time.perf_counter()
    outputs = call()
    synchronize(device)
    seconds = time.perf_counter() - start
    del outputs  # freeing them is not timed
    return seconds


def is_warm(seconds: Sequence[float]) -> bool:
    """Return whether the fastest call of the later half is at most 3 % faster than the fastest of the earlier half.

    Minima are compared because other load on the machine only makes calls slower.
    """
    half = len(seconds) // 2
    return len(seconds) > 2 and min(seconds[half:]) >= 0.97 * min(seconds[:half])


def warm_up(
    call: Callable[[], Any], device: str = 'cpu', min_seconds: float = 0.5, max_seconds: float = 60.0
) -> tuple[list[float], bool]:
    """Call repeatedly until the calls stop becoming faster.

    Returns:
        The times of the calls in seconds, and whether they became stable within ``max_seconds``.
    """
    seconds: list[float] = []
    start, elapsed = time.perf_counter(), 0.0
    while elapsed < max_seconds and not (elapsed >= min_seconds and is_warm(seconds)):
        seconds.append(time_call(call, device))
        elapsed = time.perf_counter() - start
    return seconds, is_warm(seconds)


def interleave(
    calls: Mapping[Any, Callable[[], Any]],
    rounds: int,
    device: str = 'cpu',
    after_round: Callable[[int], None] = lambda done: None,
) -> tuple[dict[Any, list[float]], dict[Any, Exception]]:
    """Time warmed-up calls in rounds: one call each per round, in an order that is shuffled for each round.

    Drifts in the machine's speed then affect all calls alike. ``after_round`` is called with the finished rounds.

    Returns:
        The seconds of each call by round, for those that never failed; and the errors of the others.
    """
    order, rng = list(calls), random.Random(0)
    seconds: dict[Any, list[float]] = {key: [] for key in calls}
    errors: dict[Any, Exception] = {}
    for i in range(rounds):
        rng.shuffle(order)
        for key in order:
            if key not in errors:
                try:
                    seconds[key].append(time_call(calls[key], device))
                except Exception as error:
                    errors[key] = error.with_traceback(None)  # a traceback would keep the call's tensors alive
        after_round(i + 1)
    return {key: times for key, times in seconds.items() if key not in errors}, errors
