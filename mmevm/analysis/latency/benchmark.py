"""Time models in several settings.

How it is measured:

- All models, engines and dtypes of one image size and batch size are interleaved: one call each per round, in an
  order that is shuffled for each round, so that drifts in the machine's speed affect all alike. Medians and spreads are
  over the rounds.
- Before that, each is called until the later half of its calls is at most 3 % faster than the earlier half, for half a
  second at least. After a minute, a note says that it was still getting faster.
- On CUDA, a time includes the device's work. float32 excludes TF32. If a batch does not fit into the memory, it is
  halved until it does, and the row says so.
- Weights are random and images are normal noise, the same for all models and in each run; ``detector`` describes how
  whole detectors are timed.
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
from itertools import groupby, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmevm.analysis.complexity import measure_complexity
from mmevm.deployment.session import ENGINES as ONNX_ENGINES
from mmevm.errors import EngineError
from mmevm.models import EfficientViM

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
        resolution: Height of the images in pixels.
        batch_size: Images per call.
        dtype: One of ``DTYPES``.
        device: 'cpu' or 'cuda'.
        deploy: Whether to switch models to deploy mode; ignored in training.
        channels_last: Whether weights and images are in channels_last for PyTorch's engines.
        training: Whether a call is forward and backward, in training mode except for the BatchNorms, which stay in eval
            mode as in a detector's backbone.
        width: Width of the images in pixels; None for square images.
    """

    resolution: int
    batch_size: int
    dtype: str = 'float32'
    device: str = 'cpu'
    deploy: bool = True
    channels_last: bool = True
    training: bool = False
    width: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.resolution, self.width or self.resolution

    def is_channels_last(self, engine: str) -> bool:
        """Return whether an engine's inputs are in channels_last."""
        return self.channels_last and engine not in ONNX_ENGINES

    def form(self, engine: str) -> dict[str, Any]:
        """Return device, dtype and memory format of weights and images for an engine."""
        layout = torch.channels_last if self.is_channels_last(engine) else torch.contiguous_format
        # OpenVINO converts to the dtype itself.
        dtype = torch.float32 if engine in ONNX_ENGINES else DTYPES[self.dtype][0]
        return dict(device=self.device, dtype=dtype, memory_format=layout)


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
    if not setting.channels_last:
        for module in model.modules():
            if isinstance(module, EfficientViM):
                module.channels_last = False
    form = setting.form(engine)
    return model.to(**form), _make_images(setting).to(**form)


def _make_images(setting: Setting) -> Tensor:
    shape = setting.batch_size, 3, *setting.size
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def make_calls(spec: ModelSpec, setting: Setting, engine: str, folder: Path) -> dict[str, Callable[[], Any]]:
    """Build a model and return functions to time, for one batch each.

    Args:
        spec: The model.
        setting: How it is called.
        engine: One of ``ENGINES``.
        folder: Where ONNX files of this spec and size are, or will be written.

    Returns:
        'whole' and, of a whole detector, also its stages 'preprocessing' and 'network'.
    """
    if spec.file is not None and engine in ONNX_ENGINES:
        x = _make_images(setting)
        return dict(whole=partial(prepare(engine, None, x, setting.dtype, setting.training, spec.file), x))
    model, x = build(spec, setting, engine)
    if spec.part == 'detector':
        from .detector import make_detector_calls  # imports mmdet

        if setting.training:
            raise EngineError('A whole detector is timed in inference only.')
        form = setting.form(engine)
        return make_detector_calls(model, setting.size, setting.batch_size, engine, setting.dtype, form, folder)
    file = folder.with_suffix('.onnx')
    return dict(whole=partial(prepare(engine, model, x, setting.dtype, setting.training, file), x))


def make_call(spec: ModelSpec, setting: Setting, engine: str) -> Callable[[], Any]:
    """Return the function that computes everything, for an engine of PyTorch."""
    return make_calls(spec, setting, engine, Path('unused'))['whole']


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
        for _, group in groupby(settings, key=lambda setting: (setting.size, setting.batch_size)):
            rows = [(setting, spec, engine) for setting, spec, engine in product(group, specs, engines)]
            count = rounds or (50 if is_cuda(rows[0][0].device) else 7)
            yield from _measure(rows, count, memory, progress)


def default_batch_size(device: str, height: int, width: int) -> int:
    """Return the paper's batch size (Sec. F: 256 on a GPU, 16 on a CPU), reduced above 512² to as many pixels."""
    return max(1, int((256 if is_cuda(device) else 16) * min(1, 512**2 / (height * width))))


def _measure(
    rows: Sequence[tuple[Setting, ModelSpec, str]], rounds: int, memory: bool, progress: Callable[[str], None]
) -> list[Result]:
    """Return the rows of one image size and batch size."""
    if any(engine == 'compile' for *_, engine in rows):
        torch._dynamo.reset()  # otherwise each compiled call checks the guards of all earlier settings
    device = rows[0][0].device
    results: list[Result] = []
    calls: dict[tuple[int, str], Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory(prefix='mmevm-latency-') as folder:
        for i, (setting, spec, engine) in enumerate(rows):
            result = Result(
                model=spec.name,
                engine=engine,
                deployed=setting.deploy and not setting.training,
                resolution=setting.resolution,
                width=setting.width,
                batch_size=setting.batch_size,
                dtype=setting.dtype,
                channels_last=setting.is_channels_last(engine),
                training=setting.training,
            )
            text = f'{result.size}, batch {setting.batch_size}'
            progress(f'{text}: warm-up of {spec.name}, {engine}, {setting.dtype}')
            results.append(result)
            if spec.file is None:
                result.params, result.flops, note = _cost(spec, setting.size)
                result.notes += [note] if note else []
            # the same files for all engines
            made = _make_warm_calls(result, spec, setting, Path(folder, str(hash(spec))), memory)
            calls |= {(i, name): call for name, call in made.items()}
        seconds, errors = interleave(calls, rounds, device, lambda done: progress(f'{text}: round {done} of {rounds}'))
    calls.clear()
    for i, ((setting, spec, engine), result) in enumerate(zip(rows, results, strict=True)):
        failed = next((error for (row, _), error in errors.items() if row == i), None)
        if failed is not None:
            result.error = summarize_error(failed)
            continue
        result.stages = {name: times for (row, name), times in seconds.items() if row == i}
        result.seconds = result.stages.pop('whole', [])
        if memory and engine == 'eager' and result.seconds and not is_cuda(device):
            progress(f'{text}: memory of {spec.name}')
            try:
                result.peak_memory = peak_cpu_memory(partial(make_call, spec, setting, engine))
            except Exception as error:
                result.notes.append(f'peak memory not measured: {summarize_error(error)}')
    return results


def _make_warm_calls(
    result: Result, spec: ModelSpec, setting: Setting, folder: Path, memory: bool
) -> dict[str, Callable[[], Any]]:
    """Return warmed-up calls, with the largest batch that fits into a GPU's memory; empty if they fail."""
    on_cuda = is_cuda(setting.device)
    calls: dict[str, Callable[[], Any]] = {}
    while True:
        setting = replace(setting, batch_size=result.batch_size)
        try:
            before = torch.cuda.memory_allocated(setting.device) if on_cuda else 0
            calls = make_calls(spec, setting, result.engine, folder)
            for call in calls.values():
                seconds, warm = warm_up(call, setting.device)
                if not warm:
                    result.notes.append(f'still getting faster after {len(seconds)} warm-up calls')
            if on_cuda and memory and result.engine != 'cudagraph':  # whose replay does not use the allocator
                torch.cuda.reset_peak_memory_stats(setting.device)
                time_call(calls['whole'], setting.device)
                result.peak_memory = torch.cuda.max_memory_allocated(setting.device) - before
            return calls
        except Exception as error:
            if not isinstance(error, torch.cuda.OutOfMemoryError) or result.batch_size == 1:
                result.error = summarize_error(error)
                return {}
        # outside the except clause, as the error's traceback keeps the call's tensors alive
        calls = {}
        gc.collect()
        torch.cuda.empty_cache()
        result.asked_batch_size = result.asked_batch_size or result.batch_size
        result.batch_size //= 2


@functools.cache
def _cost(spec: ModelSpec, size: tuple[int, int]) -> tuple[int | None, int | None, str]:
    """Return parameters, multiply-accumulates per image, and a note on them or ''."""
    params = None
    try:
        model = spec.build()
        params = sum(parameter.numel() for parameter in model.parameters())
        complexity = measure_complexity(model, (1, 3, *size))
    except Exception as error:  # also errors of the model itself, which _make_warm_call reports
        return params, None, f'FLOPs not counted: {summarize_error(error)}'
    unknown = ', '.join(sorted(complexity.unknown))
    return params, complexity.flops, f'FLOPs do not include {unknown}' if unknown else ''
