"""Measure peak memory, and turn a lack of memory into an error."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn

_CLEAR_REFS = Path('/proc/self/clear_refs')
_OUT_OF_MEMORY = ('allocate memory', 'bad_alloc', 'bad allocation', 'out of memory')


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error reports a lack of memory, on a GPU or on the CPU."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    from_engine = isinstance(error, RuntimeError) or type(error).__module__.startswith('onnxruntime')
    return from_engine and any(text in str(error) for text in _OUT_OF_MEMORY)


@contextlib.contextmanager
def limit_memory() -> Iterator[None]:
    """Make allocations beyond the available memory raise an error.

    Otherwise Linux grants them and kills the process when it uses them. Does nothing on other systems.
    """
    available = available_memory()
    if available is None:
        yield
        return
    import resource  # Unix only

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _read_kilobytes('/proc/self/status', 'VmData') + int(0.95 * available)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def available_memory() -> int | None:
    """Return the bytes available without swapping, on the machine or in its container; None if not on Linux."""
    if not Path('/proc/meminfo').exists():
        return None
    available = _read_kilobytes('/proc/meminfo', 'MemAvailable')
    cgroup = Path('/sys/fs/cgroup')
    with contextlib.suppress(OSError, ValueError):  # not in a container, or no limit ('max')
        limit = int((cgroup / 'memory.max').read_text())
        statistics = dict(line.split() for line in (cgroup / 'memory.stat').read_text().splitlines())
        used = int((cgroup / 'memory.current').read_text()) - int(statistics['inactive_file'])
        available = min(available, max(limit - used, 0))
    return available


def peak_cpu_memory(make_call: Callable[[], Callable[[], Any]], imports: tuple[str, ...] = ()) -> int:
    """Measure the memory that a model needs on the CPU, in a process of its own (Linux only).

    Args:
        make_call: Builds the model and returns the function to call. It must be picklable.
        imports: Modules to import before the measurement starts.

    Returns:
        Bytes of resident memory at the peak of the second call, less those before the model was built: weights, batch
        and activations.

    Raises:
        NotImplementedError: If the system is not Linux.
        Exception: Any error of the call.
    """
    if not _CLEAR_REFS.exists():
        raise NotImplementedError('peak memory on the CPU is measured on Linux only')
    context = get_context('forkserver')
    context.set_forkserver_preload(['mmevm.analysis.latency'])  # imports once for all measurements
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_of_this_process, make_call, imports).result()


def _peak_of_this_process(make_call: Callable[[], Callable[[], Any]], imports: tuple[str, ...]) -> int:
    for name in imports:
        import_module(name)
    with torch.no_grad():  # load the libraries' code pages
        nn.functional.conv2d(torch.ones(1, 8, 16, 16), torch.ones(8, 8, 3, 3)).flatten(1) @ torch.ones(8 * 14 * 14, 8)
    gc.collect()
    before = _read_kilobytes('/proc/self/status', 'VmRSS')
    with limit_memory():
        call = make_call()
        call()
        _CLEAR_REFS.write_text('5')  # reset the peak
        call()
    return _read_kilobytes('/proc/self/status', 'VmHWM') - before


def _read_kilobytes(file: str, name: str) -> int:
    """Return an entry of a file in /proc in bytes."""
    (line,) = (line for line in Path(file).read_text().splitlines() if line.startswith(f'{name}:'))
    return 1024 * int(line.split()[1])
