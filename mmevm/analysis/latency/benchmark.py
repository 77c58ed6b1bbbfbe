"""Time models in a grid of settings.

How it is measured:

- All models and engines of a setting (resolution, batch size, dtype) are interleaved: one call each per round, in an
  order that is shuffled for each round, so that drifts in the machine's speed affect all alike. Medians and spreads are
  over the rounds.
- Before that, each is called until the later half of its calls is at most 3 % faster than the earlier half, for half a
  second at least. After a minute, a note says that it was still getting faster.
- On CUDA, a time includes the device's work.
- Weights are random and images are normal noise, the same for all models and in each run.
- Models are in deploy mode, as their library defines it. BatchNorms that remain are noted.
- float32 excludes TF32.
- If a batch does not fit into memory, it is halved until it does, and the row says so. On Linux the process is not
  allowed to take more memory than is available, as it would be killed.
- Peak memory on the CPU is measured in a separate process, for engines that do not compile there; on CUDA it is that of
  PyTorch's allocator.
"""

import contextlib
import functools
import gc
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmevm.analysis.complexity import measure_complexity

from .engines import DTYPES, ENGINES, prepare
from .memory import is_out_of_memory, limit_memory, peak_cpu_memory
from .model_spec import ModelSpec
from .results import Result, summarize_error
from .timing import interleave, is_cuda, time_call, warm_up

ONNX_ENGINES = ('onnxruntime', 'openvino')
# On the CPU torch.compile's memory includes the compiler's; on CUDA only PyTorch's allocator reports its peak.
ENGINES_WITH_MEMORY = dict(cpu=('eager', 'onnxruntime', 'openvino'), cuda=('eager', 'compile'))


@dataclass(frozen=True)
class Setting:
    """How models are called.

    Args:
        resolution: Side of the images in pixels.
        batch_size: Images per call.
        dtype: One of ``DTYPES``.
        device: 'cpu' or 'cuda'.
        deploy: Whether to switch models to deploy mode; ignored in training.
        channels_last: Whether weights and images are in channels_last for PyTorch's engines.
        training: Whether a call is forward and backward, in training mode except for the BatchNorms, which stay in eval
            mode as in a detector's backbone.
        threads: CPU threads of every engine; None is ``torch.get_num_threads()``.
    """

    resolution: int
    batch_size: int
    dtype: str = 'float32'
    device: str = 'cpu'
    deploy: bool = True
    channels_last: bool = True
    training: bool = False
    threads: int | None = None

    def is_channels_last(self, engine: str) -> bool:
        """Return whether an engine's inputs are in channels_last."""
        return self.channels_last and engine not in ONNX_ENGINES


def build(spec: ModelSpec, setting: Setting, engine: str = 'eager') -> tuple[nn.Module, Tensor]:
    """Build a model and its input for a setting.

    Returns:
        The model, and the images, (B, 3, H, W).
    """
    model = spec.build()
    if setting.training:
        model.train()
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    elif setting.deploy:
        model = spec.deploy(model)
    shape = setting.batch_size, 3, setting.resolution, setting.resolution
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layout = torch.channels_last if setting.is_channels_last(engine) else torch.contiguous_format
    form: dict[str, Any] = dict(device=setting.device, dtype=DTYPES[setting.dtype][0], memory_format=layout)
    return model.to(**form), x.to(**form)


def make_call(spec: ModelSpec, setting: Setting, engine: str, onnx_file: Path | None = None) -> Callable[[], Any]:
    """Build a model and return a function that computes its outputs for one batch.

    Args:
        spec: The model.
        setting: How it is called.
        engine: One of ``ENGINES``.
        onnx_file: ONNX file for ONNX Runtime and OpenVINO, exported if it does not exist.
    """
    threads = setting.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    model, x = build(spec, setting, engine)
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
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[Result]:
    """Time models, interleaved within each setting.

    Args:
        models: Names or model specs.
        resolutions: Sides of the images in pixels.
        batch_sizes: Images per call; None is :func:`default_batch_size`. Halved until they fit into memory.
        dtypes: Of ``DTYPES``.
        engines: Of ``ENGINES``.
        device: 'cpu' or 'cuda'.
        deploy: Whether to switch models to deploy mode; ignored in training.
        channels_last: Whether weights and images are in channels_last for PyTorch's engines.
        training: Whether a call is forward and backward.
        threads: CPU threads of every engine; None is ``torch.get_num_threads()``.
        rounds: Number of calls to time; None is 50 on CUDA and 7 on the CPU.
        memory: Whether to measure peak memory.
        progress: Called with a description of each step.

    Yields:
        A row for each resolution, dtype, batch size, model and engine, after its setting has been measured.

    Raises:
        ValueError: If an argument is not valid.
        ConfigError: If a config cannot be read.

    Example:
        >>> from mmevm.analysis.latency import benchmark, table
        >>> results = list(benchmark(['m1', 'shvit_s1'], [224], batch_sizes=[1], rounds=3))
        >>> print(table(results, reference='shvit_s1'))  # doctest: +SKIP
    """
    specs = [model if isinstance(model, ModelSpec) else ModelSpec(model) for model in models]
    rounds = (50 if is_cuda(device) else 7) if rounds is None else rounds
    for name, numbers in dict(resolutions=resolutions, batch_sizes=batch_sizes or (), rounds=[rounds]).items():
        if any(number < 1 for number in numbers):
            raise ValueError(f'{name}={list(numbers)} must be 1 or more.')
    for name, values, known in (('dtypes', dtypes, list(DTYPES)), ('engines', engines, list(ENGINES))):
        if unknown := [value for value in values if value not in known]:
            raise ValueError(f'{name}: {", ".join(unknown)} is not one of {", ".join(known)}.')
    if is_cuda(device) and not torch.cuda.is_available():
        raise ValueError(f'device={device!r}, but PyTorch {torch.__version__} finds no GPU. Use the CPU.')

    rows = list(itertools.product(specs, engines))
    cost = functools.cache(partial(_cost, device=device, deployed=deploy and not training))
    with _pytorch_threads(threads), cuda_settings():
        for resolution, dtype in itertools.product(resolutions, dtypes):
            for batch_size in batch_sizes or [default_batch_size(device, resolution)]:
                setting = Setting(resolution, batch_size, dtype, device, deploy, channels_last, training, threads)
                yield from _measure(rows, setting, rounds, cost, memory, progress)


def default_batch_size(device: str, resolution: int) -> int:
    """Return the paper's batch size (Sec. F: 256 on a GPU, 16 on a CPU), reduced above 512² to as many pixels."""
    return max(1, int((256 if is_cuda(device) else 16) * min(1, (512 / resolution) ** 2)))


def _measure(
    rows: Sequence[tuple[ModelSpec, str]],
    setting: Setting,
    rounds: int,
    cost: Callable[[ModelSpec, int], tuple[int | None, int | None, tuple[str, ...]]],
    memory: bool,
    progress: Callable[[str], None],
) -> list[Result]:
    """Return the rows of one setting."""
    if any(engine == 'compile' for _, engine in rows):
        torch._dynamo.reset()  # otherwise each call checks the guards of all earlier settings
    results: list[Result] = []
    calls = {}
    text = f'{setting.resolution}², batch {setting.batch_size}, {setting.dtype}'
    with tempfile.TemporaryDirectory(prefix='mmevm-latency-') as folder:
        folders = {spec: Path(folder, str(i)) for i, (spec, _) in enumerate(rows)}  # engines share ONNX files
        for i, (spec, engine) in enumerate(rows):
            progress(f'{text}: warm-up of {spec.name}, {engine}')
            params, flops, notes = cost(spec, setting.resolution)
            result = Result(
                model=spec.name,
                engine=engine,
                deployed=setting.deploy and not setting.training,
                resolution=setting.resolution,
                batch_size=setting.batch_size,
                dtype=setting.dtype,
                channels_last=setting.is_channels_last(engine),
                training=setting.training,
                params=params,
                flops=flops,
                notes=list(notes),
            )
            results.append(result)
            folders[spec].mkdir(exist_ok=True)
            if (call := _make_warm_call(result, spec, setting, folders[spec], memory)) is not None:
                calls[i] = call
        seconds, errors = interleave(
            calls, rounds, setting.device, lambda done: progress(f'{text}: round {done} of {rounds}')
        )
        calls.clear()
        _free_memory(setting.device)
        for i, ((spec, engine), result) in enumerate(zip(rows, results, strict=True)):
            result.seconds = seconds.get(i, [])
            if i in errors:
                result.error = summarize_error(errors[i])
            on_cpu = not is_cuda(setting.device)
            if memory and on_cpu and result.seconds and engine in ENGINES_WITH_MEMORY['cpu']:
                progress(f'{text}: memory of {spec.name}, {engine}')
                used = replace(setting, batch_size=result.batch_size, threads=torch.get_num_threads())
                make = partial(make_call, spec, used, engine, _onnx_file(folders[spec], result))
                try:
                    result.peak_memory = peak_cpu_memory(make, (engine,) if engine in ONNX_ENGINES else ())
                except Exception as error:
                    result.notes.append(f'peak memory not measured: {summarize_error(error)}')
    return results


def _make_warm_call(
    result: Result, spec: ModelSpec, setting: Setting, folder: Path, memory: bool
) -> Callable[[], Any] | None:
    """Return a warmed-up call with the largest batch that fits into memory; None, with an error in the row, if none."""
    on_cuda = is_cuda(setting.device)
    call: Callable[[], Any] | None
    while True:
        _free_memory(setting.device)
        setting = replace(setting, batch_size=result.batch_size)
        try:
            with limit_memory():
                before = torch.cuda.memory_allocated(setting.device) if on_cuda else 0
                call = make_call(spec, setting, result.engine, _onnx_file(folder, result))
                seconds, warm = warm_up(call, setting.device)
                if on_cuda and memory and result.engine in ENGINES_WITH_MEMORY['cuda']:
                    torch.cuda.reset_peak_memory_stats(setting.device)
                    time_call(call, setting.device)
                    result.peak_memory = torch.cuda.max_memory_allocated(setting.device) - before
            if not warm:
                result.notes.append(f'still getting faster after {len(seconds)} warm-up calls')
            return call
        except Exception as error:
            if not is_out_of_memory(error) or setting.batch_size == 1:
                result.error = summarize_error(error)
        # outside the except clause, as the error's traceback keeps the call's tensors alive
        call = None
        if result.error:
            return None
        result.asked_batch_size = result.asked_batch_size or setting.batch_size
        result.batch_size //= 2


def _cost(
    spec: ModelSpec, resolution: int, device: str, deployed: bool
) -> tuple[int | None, int | None, tuple[str, ...]]:
    """Return parameters, multiply-accumulates per image, and notes on them and on deploy mode."""
    params = None
    try:
        with limit_memory():
            model = spec.build().to(device)
            params = sum(parameter.numel() for parameter in model.parameters())
            complexity = measure_complexity(model, (1, 3, resolution, resolution))
            if deployed:
                model = spec.deploy(model)
    except Exception as error:  # also errors of the model itself, which _make_warm_call reports
        return params, None, (f'FLOPs not counted: {summarize_error(error)}',)
    notes = []
    if unknown := ', '.join(sorted(complexity.unknown)):
        notes.append(f'FLOPs do not include {unknown}')
    remaining = sum(isinstance(module, _BatchNorm) for module in model.modules())
    if deployed and remaining:
        notes.append(f'{remaining} BatchNorms remain in deploy mode')
    return params, complexity.flops, tuple(notes)


def _onnx_file(folder: Path, result: Result) -> Path:
    return folder / f'{result.batch_size}.onnx'


def _free_memory(device: str) -> None:
    gc.collect()
    if is_cuda(device):
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _pytorch_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def cuda_settings() -> Iterator[None]:
    """Enable cuDNN's autotuning and disable TF32."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = True, False, False
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before
