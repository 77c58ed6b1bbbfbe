"""From models and settings to rows.

How it is measured:

- All models and engines of a setting (resolution, batch size, dtype) take turns, one call each, in an order that is
  drawn anew in each round: when the machine's speed drifts, it does so for all of them. Medians and spreads are of the
  calls of one such run.
- Before, each is called until it is warm: until the later half of its calls has nothing faster than its earlier half,
  but for 3 %, and half a second has passed. After a minute a note on the row says that it was still getting faster.
- On CUDA the clock stops when the device has finished.
- Weights are random and images normal noise, both the same for all and in each run.
- Each model has the form for inference that its library gives it. mmevm's takes large batches in parts on a CPU, in
  eager mode; BatchNorms that are left in other models are noted in their rows.
- float32 is float32: TF32 is off on CUDA.
- When memory does not suffice, the batch is halved until it does, and the row says the batch that was measured. On
  Linux a process is forbidden to take more than is there, as the kernel would grant it at first and kill it later.
- Peak memory on the CPU is that of a process of its own (``memory``); on CUDA it is that of PyTorch's allocator. What
  compiles has no figure on the CPU, and what has its own memory on CUDA has none there.
"""

import contextlib
import functools
import gc
import itertools
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmevm.analysis.complexity import measure_complexity

from .engines import DTYPES, ENGINES, prepare
from .memory import MemoryMeter, is_out_of_memory, within_available_memory
from .model_spec import ModelSpec
from .results import Result, in_one_line
from .timing import interleave, is_cuda, time_call, warm_up

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


def build(subject: ModelSpec, setting: Setting, engine: str = 'eager') -> tuple[nn.Module, Tensor]:
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
    form: dict[str, Any] = dict(device=setting.device, dtype=DTYPES[setting.dtype][0], memory_format=layout)
    return model.to(**form), x.to(**form)


def make_call(subject: ModelSpec, setting: Setting, engine: str, onnx_file: Path | None = None) -> Callable[[], Any]:
    """Build a model and make it ready to be called.

    Args:
        subject: The model.
        setting: How it will be called.
        engine: What will call it.
        onnx_file: Where its ONNX file is, or will be written.

    Returns:
        A function without arguments that computes all outputs for one batch.
    """
    threads = setting.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    model, x = build(subject, setting, engine)
    return partial(prepare(engine, model, x, setting.dtype, setting.training, threads, onnx_file), x)


def benchmark(
    models: Sequence[str | ModelSpec],
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
        >>> from mmevm.analysis.latency import benchmark, table
        >>> results = list(benchmark(['m1', 'shvit_s1'], [224], batch_sizes=[1], rounds=3))
        >>> print(table(results, reference='shvit_s1'))  # doctest: +SKIP
    """
    subjects = [model if isinstance(model, ModelSpec) else ModelSpec(model) for model in models]
    rounds = default_rounds(device) if rounds is None else rounds
    for name, numbers in dict(resolutions=resolutions, batch_sizes=batch_sizes or (), rounds=[rounds]).items():
        if any(number < 1 for number in numbers):
            raise ValueError(f'{name} are numbers from 1 on, not {list(numbers)}.')
    choices: list[tuple[str, Sequence[str], Collection[str]]]
    choices = [('dtypes', dtypes, DTYPES), ('engines', engines, ENGINES)]
    for name, values, known in choices:
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
    count = functools.cache(partial(_count, device=device, deployed=deploy and not training))
    with _threads_of_pytorch(threads), cuda_settings(), MemoryMeter() as meter:
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


def _measure(
    rows: Sequence[tuple[ModelSpec, str]],
    setting: Setting,
    rounds: int,
    count: Callable[[ModelSpec, int], tuple[int | None, int | None, tuple[str, ...]]],
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
        seconds, errors = interleave(ready, rounds, setting.device, lambda: report(text))
        ready.clear()
        _free_memory(setting.device)
        for i, ((subject, engine), result) in enumerate(zip(rows, results, strict=True)):
            result.seconds = seconds.get(i, [])
            if i in errors:
                result.error = in_one_line(errors[i])
            elif result.seconds and meter is not None and not is_cuda(setting.device):
                report(f'{subject.name}, {engine}: memory')
                if engine in ENGINES_WITH_MEMORY['cpu']:
                    threads = torch.get_num_threads()
                    setting_of_row = replace(setting, batch_size=result.batch_size, threads=threads)
                    make = partial(make_call, subject, setting_of_row, engine, _onnx_file(folders[subject], result))
                    result.peak_memory, error = meter.measure(make, [engine] if engine in ONNX_ENGINES else [])
                    result.notes += [f'no peak memory: {error}'] if error else []
    return results


def _get_ready(
    result: Result, subject: ModelSpec, setting: Setting, folder: Path, measure_memory: bool
) -> Callable[[], Any] | None:
    """A warm call with the largest batch that memory suffices for, which is noted in the row; None if there is none."""
    on_cuda = is_cuda(setting.device)
    call: Callable[[], Any] | None
    while True:
        _free_memory(setting.device)  # of what was measured before, or of what did not fit
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
        if result.error:
            return None
        result.asked_batch_size = result.asked_batch_size or setting.batch_size
        result.batch_size //= 2


def _count(
    subject: ModelSpec, resolution: int, device: str, deployed: bool
) -> tuple[int | None, int | None, tuple[str, ...]]:
    """Parameters and multiply-accumulates for one image, and notes on these and on the form for inference."""
    params = None
    try:
        with within_available_memory():
            model = subject.build().to(device)
            params = sum(parameter.numel() for parameter in model.parameters())
            complexity = measure_complexity(model, (1, 3, resolution, resolution))
            if deployed:
                model = subject.deploy(model)
    except Exception as error:  # also of the model itself, which then has no times either
        return params, None, (f'FLOPs not counted: {in_one_line(error)}',)
    notes = []
    if unknown := ', '.join(sorted(complexity.unknown)):
        notes.append(f'FLOPs without {unknown}, unknown to the counter')
    left = sum(isinstance(module, _BatchNorm) for module in model.modules())
    if deployed and left:
        notes.append(f'{left} BatchNorms are left in its form for inference')
    return params, complexity.flops, tuple(notes)


def _onnx_file(folder: Path, result: Result) -> Path:
    return folder / f'{result.batch_size}.onnx'


def _free_memory(device: str) -> None:
    gc.collect()
    if is_cuda(device):
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
def cuda_settings() -> Iterator[None]:
    """Within, cuDNN tries what is fastest for a size, and nothing takes TF32 for float32."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = True, False, False
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before
