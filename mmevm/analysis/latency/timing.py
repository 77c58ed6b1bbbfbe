"""The clock: calls in turns, after a warm-up."""

import os
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch

Key = TypeVar('Key', bound=Hashable)


def keep_kernels() -> None:
    """Let oneDNN keep the kernels of all models that take turns: of the 1024 of its default, each drives out another's.

    For the beginning of a process: oneDNN asks for it once, with its first kernel.
    """
    os.environ.setdefault('ONEDNN_PRIMITIVE_CACHE_CAPACITY', '65536')


def is_cuda(device: str | torch.device) -> bool:
    """Whether a device is a GPU of CUDA's."""
    return torch.device(device).type == 'cuda'


def synchronise(device: str | torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU has."""
    if is_cuda(device):
        torch.cuda.synchronize(device)


def time_call(call: Callable[[], Any], device: str | torch.device = 'cpu') -> float:
    """Seconds of one call, until the device has finished."""
    synchronise(device)
    start = time.perf_counter()
    outputs = call()
    synchronise(device)
    seconds = time.perf_counter() - start
    del outputs  # after the clock has stopped
    return seconds


def is_warm(seconds: Sequence[float], tolerance: float = 0.03) -> bool:
    """Whether calls have stopped becoming faster.

    Args:
        seconds: Times of all calls so far, in order.
        tolerance: How much faster than the fastest call of the earlier half that of the later may be. The fastest are
            compared because whatever else a machine does only makes calls slower.

    Example:
        >>> is_warm([3.0, 1.0, 1.0]), is_warm([3.0, 1.0, 1.0, 1.0])
        (False, True)
    """
    half = len(seconds) // 2
    return half > 0 and len(seconds) > 2 and min(seconds[half:]) >= (1 - tolerance) * min(seconds[:half])


def warm_up(
    call: Callable[[], Any], device: str = 'cpu', at_least: float = 0.5, at_most: float = 60.0
) -> tuple[list[float], bool]:
    """Call until it is warm.

    Args:
        call: What to call.
        device: Where it runs.
        at_least: Seconds that it takes.
        at_most: Seconds after which it ends, warm or not.

    Returns:
        The times of the calls, and whether they have become warm.
    """
    seconds: list[float] = []
    start = time.perf_counter()
    while True:
        seconds.append(time_call(call, device))
        elapsed = time.perf_counter() - start
        warm = elapsed >= at_least and is_warm(seconds)
        if warm or elapsed >= at_most:
            return seconds, warm


def interleave(
    calls: Mapping[Key, Callable[[], Any]],
    rounds: int,
    device: str = 'cpu',
    after_call: Callable[[], None] | None = None,
) -> tuple[dict[Key, list[float]], dict[Key, Exception]]:
    """Time calls in rounds, each once in a round, in an order that changes from round to round.

    Args:
        calls: What to call, warm.
        rounds: How often each has its turn.
        device: Where they run.
        after_call: Called after each, outside of its time.

    Returns:
        The seconds of each, round by round, of those that have ended all their calls; and why others have not.
    """
    order, draw = list(calls), random.Random(0)
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    errors: dict[Key, Exception] = {}
    for _ in range(rounds):
        draw.shuffle(order)
        for key in order:
            if key not in errors:
                try:
                    seconds[key].append(time_call(calls[key], device))
                except Exception as error:
                    errors[key] = error.with_traceback(None)  # which would keep what the call has allocated
            if after_call is not None:
                after_call()
    return {key: times for key, times in seconds.items() if key not in errors}, errors
