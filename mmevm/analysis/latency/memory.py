"""Peak memory, and what happens where memory does not suffice.

Peak memory is what a model needs in all: weights, the batch, and what lives at once during a call. On the CPU it is
that of a process of its own, by Linux's high-water mark of memory in use, reset after a first call, less what the
process used before the model was built; the pages of the libraries are not in it as far as they were in use by then.
"""

import contextlib
import gc
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import nn

from .results import in_one_line

PROC = Path('/proc/self')


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory does not suffice, that of a GPU or of the machine."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    sentences = (
        *("can't allocate memory", 'Cannot allocate memory', 'Failed to allocate memory'),
        *('bad_alloc', 'bad allocation', 'out of memory'),
    )
    of_an_engine = isinstance(error, RuntimeError) or type(error).__module__.startswith('onnxruntime')
    return of_an_engine and any(sentence in str(error) for sentence in sentences)


@contextlib.contextmanager
def within_available_memory() -> Iterator[None]:
    """Within, an allocation of more memory than the machine has left raises an error.

    Otherwise Linux would grant it, and kill the process once it uses what it was granted. Elsewhere it does nothing.
    """
    available = available_memory()
    if available is None:
        yield
        return
    import resource  # which only Unix has

    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _status('VmData') + int(0.95 * available)
    if before[1] != resource.RLIM_INFINITY:
        limit = min(limit, before[1])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def available_memory() -> int | None:
    """Bytes that can be taken without swapping, of the machine or of its container; None where Linux does not say."""
    meminfo, cgroup = Path('/proc/meminfo'), Path('/sys/fs/cgroup')
    if not meminfo.exists():
        return None
    available = _kilobytes(meminfo, 'MemAvailable')
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit, which is the word 'max'
        limit = int((cgroup / 'memory.max').read_text())
        statistics = dict(line.split() for line in (cgroup / 'memory.stat').read_text().splitlines())
        used = int((cgroup / 'memory.current').read_text()) - int(statistics['inactive_file'])
        available = min(available, max(limit - used, 0))
    return available


class _Server(NamedTuple):
    process: subprocess.Popen
    questions: BinaryIO
    answers: BinaryIO


class MemoryMeter(contextlib.AbstractContextManager):
    """Measures peak memory on the CPU, each time in a process of its own.

    The processes are forked from one that has imported mmevm and computed nothing, which saves the imports.

    Example:
        >>> from functools import partial
        >>> with MemoryMeter() as meter:
        ...     peak, error = meter.measure(partial(partial, torch.ones, 50_000_000))
        >>> round(peak / 1e6, -1)
        200.0
    """

    def __init__(self) -> None:
        self._server: _Server | None = None

    def __exit__(self, *error: object) -> None:
        self.close()

    def measure(
        self, make: Callable[[], Callable[[], Any]], imports: Sequence[str] = ()
    ) -> tuple[int | None, str | None]:
        """Measure what making and making use of a function needs.

        Args:
            make: Returns the function; it is pickled.
            imports: Modules to import before.

        Returns:
            Bytes at the peak of a call after the first, with everything that ``make`` keeps; or None, and why.
        """
        if not (PROC / 'clear_refs').exists():
            return None, 'peak memory of the CPU is measured on Linux alone'
        if self._server is None:
            self._server = _start_server()
        try:
            pickle.dump((pickle.dumps(make), tuple(imports)), self._server.questions)
            self._server.questions.flush()
            peak, error = pickle.load(self._server.answers)
        except (EOFError, OSError):
            self.close()
            return None, 'the process that measures peak memory has died'
        return peak, error

    def close(self) -> None:
        """End the process."""
        if self._server is not None:
            with contextlib.suppress(OSError):
                self._server.questions.close()
            self._server.process.wait()
            self._server.answers.close()
            self._server = None


def _start_server() -> _Server:
    from_questions, questions = os.pipe()
    answers, to_answers = os.pipe()
    process = subprocess.Popen(
        [sys.executable, '-c', f'from mmevm.analysis.latency import memory; memory._serve({to_answers})'],
        stdin=from_questions,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[to_answers],
        env=os.environ | dict(PYTHONPATH=os.pathsep.join(path or os.getcwd() for path in sys.path)),
    )
    os.close(from_questions)
    os.close(to_answers)
    return _Server(process, os.fdopen(questions, 'wb'), os.fdopen(answers, 'rb'))


def _serve(to_answers: int) -> None:
    """Measure, in a fork each, what comes in on standard input."""
    while True:
        try:
            make, imports = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        child = os.fork()
        if child == 0:
            answer: tuple[int | None, str | None]
            try:
                answer = _peak_of_this_process(make, imports), None
            except BaseException as error:
                answer = None, in_one_line(error)
            os.write(to_answers, pickle.dumps(answer))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            os.write(to_answers, pickle.dumps((None, f'the process ended with {os.waitstatus_to_exitcode(status)}')))


def _peak_of_this_process(pickled: bytes, imports: Sequence[str]) -> int:
    for name in imports:
        __import__(name)
    make = pickle.loads(pickled)
    with torch.no_grad():  # the pages of PyTorch's own code are not the model's
        nn.functional.conv2d(torch.ones(1, 8, 16, 16), torch.ones(8, 8, 3, 3)).flatten(1) @ torch.ones(8 * 14 * 14, 8)
    gc.collect()
    before = _status('VmRSS')
    with within_available_memory():
        call = make()
        call()
        (PROC / 'clear_refs').write_text('5')  # resets the high-water mark
        call()
    return _status('VmHWM') - before


def _status(name: str) -> int:
    """Bytes of an entry of this process's status."""
    return _kilobytes(PROC / 'status', name)


def _kilobytes(file: Path, name: str) -> int:
    (line,) = [line for line in file.read_text().splitlines() if line.startswith(f'{name}:')]
    return 1024 * int(line.split()[1])
