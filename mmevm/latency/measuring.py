"""The clock: many models in turns, after a warm-up, and the memory that each needs.

How it is measured:

- All models and engines of a setting (resolution, batch size, dtype) take turns, one call each, in an order that is
  drawn anew in each round: when the machine's speed drifts, it does so for all of them. Medians and spreads are of the
  calls of one such run.
- Before, each is called until it is warm: until the later half of its calls has nothing faster than its earlier half,
  but for 3 %, and half a second has passed. After a minute a note on the row says that it was still getting faster.
- On CUDA the clock stops when the device has finished.
- Weights are random and images normal noise, both the same for all and in each run.
- When memory does not suffice, the batch is halved until it does, and the row says the batch that was measured. On
  Linux a process is forbidden to take more than is there, as the kernel would grant it at first and kill it later.
- Peak memory is what a model needs in all: weights, the batch, and what lives at once during a call. On the CPU it is
  that of a process of its own, by Linux's high-water mark of memory in use, reset after a first call, less what the
  process used before the model was built; the pages of the libraries are not in it as far as they were in use by then.
  On CUDA it is that of PyTorch's allocator. What compiles has no figure on the CPU, and what has its own memory on CUDA
  has none there.
"""

import contextlib
import functools
import gc
import itertools
import os
import pickle
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmevm.complexity import measure_complexity

from .engines import DTYPES, ENGINES, prepare
from .results import Result
from .subjects import Subject

Key = TypeVar('Key', bound=Hashable)

PROC = Path('/proc/self')
ONNX_ENGINES = ('onnxruntime', 'openvino')
# Engines whose memory can be told: on the CPU all but what compiles in the process, on CUDA what PyTorch allocates.
ENGINES_WITH_MEMORY = dict(cpu=('eager', 'onnxruntime', 'openvino'), cuda=('eager', 'compile'))


@dataclass(frozen=True)
class Setting:
    """How a model is called.

    Args:
        resolution: Pixels of a side of the image.
        batch_size: Images of a call.
        dtype: One of ``DTYPES``.
        device: Where it runs.
        deploy: Whether it has its form for inference; never in training.
        channels_last: Whether weights and images are in channels_last; engines other than PyTorch's have their own.
        training: Whether a call is forward and backward, in training mode but for the BatchNorms, which stay in eval
            mode as a detector's backbone has them.
        threads: Threads of every engine on the CPU; None leaves PyTorch's number, and gives it to the others.
    """

    resolution: int
    batch_size: int
    dtype: str = 'float32'
    device: str = 'cpu'
    deploy: bool = True
    channels_last: bool = True
    training: bool = False
    threads: int | None = None

    @property
    def is_deployed(self) -> bool:
        """Whether the model has its form for inference."""
        return self.deploy and not self.training

    def is_channels_last(self, engine: str) -> bool:
        """Whether what an engine gets is in channels_last."""
        return self.channels_last and engine not in ONNX_ENGINES


def build(subject: Subject, setting: Setting, engine: str = 'eager') -> tuple[nn.Module, Tensor]:
    """Build a model and its input as a setting has them.

    Args:
        subject: The model.
        setting: How it will be called.
        engine: What will call it.

    Returns:
        The model, and the images, (B, 3, H, W).
    """
    model = subject.build()
    if setting.training:
        model.train()
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    elif setting.deploy:
        model = subject.deploy(model)
    x = torch.randn(
        setting.batch_size, 3, setting.resolution, setting.resolution, generator=torch.Generator().manual_seed(0)
    )
    layout = torch.channels_last if setting.is_channels_last(engine) else torch.contiguous_format
    form = dict(device=setting.device, dtype=DTYPES[setting.dtype][0], memory_format=layout)
    return model.to(**form), x.to(**form)


def make_call(subject: Subject, setting: Setting, engine: str, onnx_file: Path | None = None) -> Callable[[], Any]:
    """Build a model and make it ready to be called.

    Args:
        subject: The model.
        setting: How it will be called.
        engine: What will call it.
        onnx_file: Where its ONNX file is, or will be written.

    Returns:
        A function without arguments that computes all outputs for one batch.
    """
    model, x = build(subject, setting, engine)
    threads = setting.threads or torch.get_num_threads()
    return partial(prepare(engine, model, x, setting.dtype, setting.training, threads, onnx_file), x)


def time_call(call: Callable[[], Any], device: str = 'cpu') -> float:
    """Seconds of one call, until the device has finished."""
    _synchronise(device)
    start = time.perf_counter()
    outputs = call()
    _synchronise(device)
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


def take_turns(
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory does not suffice, that of a GPU or of the machine."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    sentences = ("can't allocate memory", 'Cannot allocate memory', 'bad_alloc', 'bad allocation', 'out of memory')
    return isinstance(error, RuntimeError) and any(sentence in str(error) for sentence in sentences)


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
        self._server: subprocess.Popen | None = None

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
            self._start()
        try:
            pickle.dump((pickle.dumps(make), tuple(imports)), self._server.stdin)
            self._server.stdin.flush()
            peak, error = pickle.load(self._answers)
        except (EOFError, OSError):
            self.close()
            return None, 'the process that measures peak memory has died'
        return peak, error

    def close(self) -> None:
        """End the process."""
        if self._server is not None:
            with contextlib.suppress(OSError):
                self._server.stdin.close()
            self._server.wait()
            self._answers.close()
            self._server = None

    def _start(self) -> None:
        answers, to_answers = os.pipe()
        self._server = subprocess.Popen(
            [sys.executable, '-c', f'from mmevm.latency import measuring; measuring._serve({to_answers})'],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[to_answers],
            env=os.environ | dict(PYTHONPATH=os.pathsep.join(path or os.getcwd() for path in sys.path)),
        )
        os.close(to_answers)
        self._answers = os.fdopen(answers, 'rb')


def _serve(to_answers: int) -> None:
    """Measure, in a fork each, what comes in on standard input."""
    while True:
        try:
            make, imports = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        child = os.fork()
        if child == 0:
            try:
                answer = _peak_of_this_process(make, imports), None
            except BaseException as error:
                answer = None, in_one_line(error)
            os.write(to_answers, pickle.dumps(answer))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            os.write(to_answers, pickle.dumps((None, f'the process ended with {os.waitstatus_to_exitcode(status)}')))


def _peak_of_this_process(make: bytes, imports: Sequence[str]) -> int:
    for name in imports:
        __import__(name)
    make = pickle.loads(make)
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


def benchmark(
    models: Sequence[str | Subject],
    resolutions: Sequence[int] = (512,),
    batch_sizes: Sequence[int] | None = None,
    dtypes: Sequence[str] = ('float32',),
    engines: Sequence[str] = ('eager',),
    device: str = 'cpu',
    *,
    deploy: bool = True,
    channels_last: bool = True,
    training: bool = False,
    threads: int | None = None,
    rounds: int | None = None,
    memory: bool = True,
    progress: Callable[[str, float], None] | None = None,
) -> Iterator[Result]:
    """Time models in turns.

    Args:
        models: Names, or subjects for parts of configs and for ``with_cp``.
        resolutions: Sides of the images in pixels.
        batch_sizes: Images of a call; None is :func:`default_batch_size`. Halved until memory suffices.
        dtypes: Of ``DTYPES``.
        engines: Of ``ENGINES``.
        device: 'cpu' or 'cuda'.
        deploy: Whether models take their form for inference, but in training.
        channels_last: Whether PyTorch's weights and images are in channels_last.
        training: Whether a call is forward and backward in place of forward.
        threads: Threads of every engine on the CPU; None is ``torch.get_num_threads()``.
        rounds: How often each has its turn; None is :func:`default_rounds`.
        memory: Whether to measure peak memory.
        progress: Called with what is being done, and the share of all that has been done, from 0 to 1.

    Yields:
        A row for each resolution, batch size, dtype, model and engine; those of a setting once it has been measured.

    Raises:
        ValueError: If a name or a number cannot be meant.
        ConfigError: If a config cannot be read.

    Example:
        >>> from mmevm.latency import benchmark, table
        >>> results = list(benchmark(['m1', 'shvit_s1'], [224], batch_sizes=[1], rounds=3))
        >>> print(table(results, reference='shvit_s1'))  # doctest: +SKIP
    """
    subjects = [model if isinstance(model, Subject) else Subject(model) for model in models]
    rounds = default_rounds(device) if rounds is None else rounds
    for name, numbers in dict(resolutions=resolutions, batch_sizes=batch_sizes or (), rounds=[rounds]).items():
        if any(number < 1 for number in numbers):
            raise ValueError(f'{name} are numbers from 1 on, not {list(numbers)}.')
    for name, values, known in [('dtypes', dtypes, DTYPES), ('engines', engines, ENGINES)]:
        if unknown := [value for value in values if value not in known]:
            raise ValueError(f'{name}: {", ".join(unknown)} is none of {", ".join(known)}.')
    if torch.device(device).type == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f'device={device!r}, but PyTorch {torch.__version__} sees no GPU here.')

    rows = list(itertools.product(subjects, engines))
    settings = [
        Setting(resolution, batch_size, dtype, device, deploy, channels_last, training, threads)
        for resolution, dtype in itertools.product(resolutions, dtypes)
        for batch_size in batch_sizes or [default_batch_size(device, resolution)]
    ]
    count = functools.cache(partial(_count, device=device))
    with _threads_of_pytorch(threads), _tuned_convolutions(device), MemoryMeter() as meter:
        for i, setting in enumerate(settings):
            steps = len(rows) * (1 + rounds + memory)
            done = itertools.count(i * steps)

            def report(text: str, done: Iterator[int] = done, steps: int = steps) -> None:
                if progress is not None:
                    progress(text, next(done) / (steps * len(settings)))

            yield from _measure(rows, setting, rounds, count, meter if memory else None, report)


def default_batch_size(device: str, resolution: int) -> int:
    """Images of a call: as many as in the paper (Sec. F), and above 512² no more pixels than that many of 512²."""
    batch_size = 256 if torch.device(device).type == 'cuda' else 16
    return max(1, int(batch_size * min(1, (512 / resolution) ** 2)))


def default_rounds(device: str) -> int:
    """Rounds: enough for a median, in a few minutes on a CPU."""
    return 50 if torch.device(device).type == 'cuda' else 7


def in_one_line(error: BaseException) -> str:
    """An error's type and the first line of what it says."""
    return ': '.join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _measure(
    rows: Sequence[tuple[Subject, str]],
    setting: Setting,
    rounds: int,
    count: Callable[[Subject, int], tuple[int | None, int | None, tuple[str, ...]]],
    meter: MemoryMeter | None,
    report: Callable[[str], None],
) -> list[Result]:
    """Rows of one setting."""
    if 'compile' in (engine for _, engine in rows):
        torch._dynamo.reset()  # what earlier settings have compiled would be searched in each call
    results, ready = [], {}
    with tempfile.TemporaryDirectory(prefix='mmevm-latency-') as folder:
        folders = {subject: Path(folder, str(i)) for i, (subject, _) in enumerate(rows)}
        for i, (subject, engine) in enumerate(rows):
            report(f'{subject.name}, {engine}: warm-up')
            result = Result(
                model=subject.name,
                engine=engine,
                deployed=setting.is_deployed,
                resolution=setting.resolution,
                batch_size=setting.batch_size,
                dtype=setting.dtype,
                channels_last=setting.is_channels_last(engine),
                training=setting.training,
                with_cp=setting.training and subject.recomputes,
            )
            result.params, result.flops, notes = count(subject, setting.resolution)
            result.notes += notes
            folders[subject].mkdir(exist_ok=True)
            call = _get_ready(result, subject, setting, folders[subject], measure_memory=meter is not None)
            if call is not None:
                ready[i] = call
            results.append(result)
        text = f'{setting.resolution}², batch {setting.batch_size}, {setting.dtype}: {rounds} rounds'
        seconds, errors = take_turns(ready, rounds, setting.device, lambda: report(text))
        ready.clear()
        _free_memory(setting.device)
        for i, ((subject, engine), result) in enumerate(zip(rows, results, strict=True)):
            result.seconds = seconds.get(i, [])
            if i in errors:
                result.error = in_one_line(errors[i])
            elif result.seconds and meter is not None and not _on_cuda(setting.device):
                report(f'{subject.name}, {engine}: memory')
                if engine in ENGINES_WITH_MEMORY['cpu']:
                    setting_of_row = replace(setting, batch_size=result.batch_size)
                    make = partial(make_call, subject, setting_of_row, engine, _onnx_file(folders[subject], result))
                    result.peak_memory, error = meter.measure(make, [engine] if engine in ONNX_ENGINES else [])
                    result.notes += [f'no peak memory: {error}'] if error else []
    return results


def _get_ready(
    result: Result, subject: Subject, setting: Setting, folder: Path, measure_memory: bool
) -> Callable[[], Any] | None:
    """A warm call with the largest batch that memory suffices for, which is noted in the row; None if there is none."""
    on_cuda = _on_cuda(setting.device)
    while True:
        setting = replace(setting, batch_size=result.batch_size)
        try:
            with within_available_memory():
                before = torch.cuda.memory_allocated(setting.device) if on_cuda else 0
                call = make_call(subject, setting, result.engine, _onnx_file(folder, result))
                seconds, warm = warm_up(call, setting.device)
                if on_cuda and measure_memory and result.engine in ENGINES_WITH_MEMORY['cuda']:
                    torch.cuda.reset_peak_memory_stats(setting.device)
                    time_call(call, setting.device)
                    result.peak_memory = torch.cuda.max_memory_allocated(setting.device) - before
            if not warm:
                result.notes.append(f'still becoming faster after {len(seconds)} calls of warm-up')
            return call
        except Exception as error:
            if not is_out_of_memory(error) or setting.batch_size == 1:
                result.error = in_one_line(error)
        # After the except clause, as the error's traceback keeps what the call has allocated.
        call = None
        _free_memory(setting.device)
        if result.error:
            return None
        result.asked_batch_size = result.asked_batch_size or setting.batch_size
        result.batch_size //= 2


def _count(subject: Subject, resolution: int, device: str) -> tuple[int | None, int | None, tuple[str, ...]]:
    """Parameters and multiply-accumulates for one image, and notes on what is missing in them."""
    params = None
    try:
        with within_available_memory():
            model = subject.build().to(device)
            params = sum(parameter.numel() for parameter in model.parameters())
            complexity = measure_complexity(model, (1, 3, resolution, resolution))
    except Exception as error:  # also of the model itself, which then has no times either
        return params, None, (f'FLOPs not counted: {in_one_line(error)}',)
    unknown = ', '.join(sorted(complexity.unknown))
    return params, complexity.flops, (f'FLOPs without {unknown}, unknown to the counter',) if unknown else ()


def _onnx_file(folder: Path, result: Result) -> Path:
    return folder / f'{result.batch_size}.onnx'


def _on_cuda(device: str) -> bool:
    return torch.device(device).type == 'cuda'


def _synchronise(device: str) -> None:
    if _on_cuda(device):
        torch.cuda.synchronize(device)


def _free_memory(device: str) -> None:
    gc.collect()
    if _on_cuda(device):
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _threads_of_pytorch(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _tuned_convolutions(device: str) -> Iterator[None]:
    """The sizes stay the same, so cuDNN may try what is fastest for them."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or _on_cuda(device)
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _status(name: str) -> int:
    """Bytes of an entry of this process's status."""
    return _kilobytes(PROC / 'status', name)


def _kilobytes(file: Path, name: str) -> int:
    (line,) = [line for line in file.read_text().splitlines() if line.startswith(f'{name}:')]
    return 1024 * int(line.split()[1])
