"""Time models in several settings.

How it is measured:

- All models and engines of a setting (resolution, batch size, dtype) are interleaved: one call each per round, in an
  order that is shuffled for each round, so that drifts in the machine's speed affect all alike. Medians and spreads are
  over the rounds.
- Before that, each is called until the later half of its calls is at most 3 % faster than the earlier half, for half a
  second at least. After a minute, a note says that it was still getting faster.
- On CUDA, a time includes the device's work. float32 excludes TF32. If a batch does not fit into the memory, it is
  halved until it does, and the row says so.
- Weights are random and images are normal noise, the same for all models and in each run.
- Models are in deploy mode, as their library defines it.
- Peak memory on the CPU is measured for eager mode, in a process of its own (Linux only); on CUDA it is that of
  PyTorch's allocator.
"""

import functools
import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmevm.analysis.complexity import measure_complexity

from .engines import DTYPES, prepare
from .memory import peak_cpu_memory
from .model_spec import ModelSpec
from .results import Result, summarize_error
from .timing import interleave, is_cuda, time_call, warm_up

# cuDNN's autotuning, and no TF32. Matrix products do not use TF32 by default.
cudnn_settings = partial(torch.backends.cudnn.flags, enabled=True, benchmark=True, allow_tf32=False)


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
    """

    resolution: int
    batch_size: int
    dtype: str = 'float32'
    device: str = 'cpu'
    deploy: bool = True
    channels_last: bool = True
    training: bool = False

    def is_channels_last(self, engine: str) -> bool:
        """Return whether an engine's inputs are in channels_last."""
        return self.channels_last and engine not in ('onnxruntime', 'openvino')


def build(spec: ModelSpec, setting: Setting, engine: str = 'eager') -> tuple[nn.Module, Tensor]:
    """Build a model and its images, (B, 3, H, W), for a setting."""
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
    """Build a model and return a function that computes its outputs for one batch; arguments as in ``prepare``."""
    model, x = build(spec, setting, engine)
    return partial(prepare(engine, model, x, setting.dtype, setting.training, onnx_file), x)


def benchmark(
    models: Sequence[str | ModelSpec],
    settings: Sequence[Setting],
    engines: Sequence[str] = ('eager',),
    rounds: int | None = None,
    memory: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[Result]:
    """Time models, interleaved within each setting, on as many CPU threads as PyTorch uses.

    Args:
        models: Names or model specs.
        settings: How they are called.
        engines: Of ``ENGINES``.
        rounds: Number of calls to time; None is 50 on CUDA and 7 on the CPU.
        memory: Whether to measure peak memory.
        progress: Called with a description of each step.

    Yields:
        A row for each setting, model and engine, after its setting has been measured. Errors of a model or engine are
        in its row.

    Raises:
        ValueError: If the name of a model is unknown.
        ConfigError: If a config cannot be read.
    """
    specs = [model if isinstance(model, ModelSpec) else ModelSpec(model) for model in models]
    with cudnn_settings():
        for setting in settings:
            count = rounds or (50 if is_cuda(setting.device) else 7)
            yield from _measure(list(product(specs, engines)), setting, count, memory, progress)


def default_batch_size(device: str, resolution: int) -> int:
    """Return the paper's batch size (Sec. F: 256 on a GPU, 16 on a CPU), reduced above 512² to as many pixels."""
    return max(1, int((256 if is_cuda(device) else 16) * min(1, (512 / resolution) ** 2)))


def _measure(
    rows: Sequence[tuple[ModelSpec, str]], setting: Setting, rounds: int, memory: bool, progress: Callable[[str], None]
) -> list[Result]:
    """Return the rows of one setting."""
    if any(engine == 'compile' for _, engine in rows):
        torch._dynamo.reset()  # otherwise each compiled call checks the guards of all earlier settings
    text = f'{setting.resolution}², batch {setting.batch_size}, {setting.dtype}'
    results: list[Result] = []
    calls = {}
    with tempfile.TemporaryDirectory(prefix='mmevm-latency-') as folder:
        for i, (spec, engine) in enumerate(rows):
            progress(f'{text}: warm-up of {spec.name}, {engine}')
            result = Result(
                model=spec.name,
                engine=engine,
                deployed=setting.deploy and not setting.training,
                resolution=setting.resolution,
                batch_size=setting.batch_size,
                dtype=setting.dtype,
                channels_last=setting.is_channels_last(engine),
                training=setting.training,
            )
            results.append(result)
            result.params, result.flops, note = _cost(spec, setting.resolution)
            result.notes += [note] if note else []
            onnx_file = Path(folder, f'{hash(spec)}.onnx')  # the same for all engines
            if (call := _make_warm_call(result, spec, setting, onnx_file, memory)) is not None:
                calls[i] = call
        seconds, errors = interleave(
            calls, rounds, setting.device, lambda done: progress(f'{text}: round {done} of {rounds}')
        )
    calls.clear()
    for i, ((spec, engine), result) in enumerate(zip(rows, results, strict=True)):
        result.seconds = seconds.get(i, [])
        if i in errors:
            result.error = summarize_error(errors[i])
        if memory and engine == 'eager' and result.seconds and not is_cuda(setting.device):
            progress(f'{text}: memory of {spec.name}')
            try:
                result.peak_memory = peak_cpu_memory(partial(make_call, spec, setting, engine))
            except Exception as error:
                result.notes.append(f'peak memory not measured: {summarize_error(error)}')
    return results


def _make_warm_call(
    result: Result, spec: ModelSpec, setting: Setting, onnx_file: Path, memory: bool
) -> Callable[[], Any] | None:
    """Return a warmed-up call, with the largest batch that fits into a GPU's memory; None if it fails."""
    on_cuda = is_cuda(setting.device)
    call: Callable[[], Any] | None
    while True:
        setting = replace(setting, batch_size=result.batch_size)
        try:
            before = torch.cuda.memory_allocated(setting.device) if on_cuda else 0
            call = make_call(spec, setting, result.engine, onnx_file)
            seconds, warm = warm_up(call, setting.device)
            if not warm:
                result.notes.append(f'still getting faster after {len(seconds)} warm-up calls')
            if on_cuda and memory and result.engine != 'cudagraph':  # whose replay does not use the allocator
                torch.cuda.reset_peak_memory_stats(setting.device)
                time_call(call, setting.device)
                result.peak_memory = torch.cuda.max_memory_allocated(setting.device) - before
            return call
        except Exception as error:
            if not isinstance(error, torch.cuda.OutOfMemoryError) or result.batch_size == 1:
                result.error = summarize_error(error)
                return None
        # outside the except clause, as the error's traceback keeps the call's tensors alive
        call = None
        gc.collect()
        torch.cuda.empty_cache()
        result.asked_batch_size = result.asked_batch_size or result.batch_size
        result.batch_size //= 2


@functools.cache
def _cost(spec: ModelSpec, resolution: int) -> tuple[int | None, int | None, str]:
    """Return parameters, multiply-accumulates per image, and a note on them or ''."""
    params = None
    try:
        model = spec.build()
        params = sum(parameter.numel() for parameter in model.parameters())
        complexity = measure_complexity(model, (1, 3, resolution, resolution))
    except Exception as error:  # also errors of the model itself, which _make_warm_call reports
        return params, None, f'FLOPs not counted: {summarize_error(error)}'
    unknown = ', '.join(sorted(complexity.unknown))
    return params, complexity.flops, f'FLOPs do not include {unknown}' if unknown else ''
