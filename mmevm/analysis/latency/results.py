"""The rows of a benchmark, their file, and their table."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# What has a say in the times, by the names of the distributions.
PACKAGES = (
    *('mmevm', 'torch', 'torchvision', 'timm', 'numpy', 'onnx', 'onnxscript', 'onnxruntime', 'onnxruntime-gpu'),
    *('openvino', 'triton', 'onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmpretrain'),
    *('mmengine', 'mmcv', 'mmcv-lite', 'mmdet', 'mmpretrain'),
)


@dataclass
class Result:
    """One row of a benchmark: one model in one setting.

    Attributes:
        model: The name that was asked for: 'm4', 'shvit_s4', 'configs/….py'.
        engine: One of ``mmevm.analysis.latency.ENGINES``.
        deployed: Whether the model had its form for inference.
        resolution: Pixels of a side of the image.
        batch_size: Images of a call, after halvings.
        dtype: One of ``mmevm.analysis.latency.DTYPES``.
        channels_last: Whether weights and images were in channels_last.
        training: Whether a call was forward and backward in place of forward.
        params: Parameters, before deployment.
        flops: Multiply-accumulates for one image, before deployment.
        peak_memory: Bytes that the model needed in all, see ``mmevm.analysis.latency.benchmark``.
        seconds: Times of one call each, in the order in which they were measured.
        error: Why there are no times.
        with_cp: Whether activations were recomputed in the backward pass.
        asked_batch_size: Images of a call that were asked for, if memory sufficed for fewer.
        notes: What else a reader has to know.
    """

    model: str
    engine: str
    deployed: bool
    resolution: int
    batch_size: int
    dtype: str
    channels_last: bool
    training: bool = False
    params: int | None = None
    flops: int | None = None
    peak_memory: int | None = None
    seconds: list[float] = field(default_factory=list)
    error: str | None = None
    with_cp: bool = False
    asked_batch_size: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def milliseconds(self) -> float | None:
        """Median time, in milliseconds per image; None if there are no times."""
        return 1e3 * statistics.median(self.seconds) / self.batch_size if self.seconds else None

    @property
    def spread(self) -> float | None:
        """Half the interquartile range relative to the median; None with fewer than two times."""
        if len(self.seconds) < 2:
            return None
        lower, median, upper = statistics.quantiles(self.seconds, n=4, method='inclusive')
        return (upper - lower) / 2 / median

    @property
    def images_per_second(self) -> float | None:
        """Images a second at the median time; None if there are no times."""
        milliseconds = self.milliseconds
        return None if milliseconds is None else 1e3 / milliseconds

    @property
    def setting(self) -> tuple:
        """What rows must have in common to be compared: all but the model, and what follows from it."""
        batch_size = self.asked_batch_size or self.batch_size
        return self.engine, self.resolution, batch_size, self.dtype, self.training


def relative_times(results: Sequence[Result], reference: str) -> list[float | None]:
    """Times per image divided by those of a reference, in the same setting and by the same engine.

    Args:
        results: Rows, of any settings.
        reference: Model of the rows to divide by.

    Returns:
        A ratio for each row, below 1 if it is faster than the reference; None if one of the two has no times.

    Raises:
        ValueError: If no row is of the reference.
    """
    times = {result.setting: result.milliseconds for result in results if result.model == reference}
    if not times:
        models = ', '.join(dict.fromkeys(result.model for result in results))
        raise ValueError(f'The reference {reference!r} is none of the models that were measured: {models}.')
    return [_ratio(result.milliseconds, times.get(result.setting)) for result in results]


def table(results: Sequence[Result], reference: str) -> str:
    """The rows as tables in Markdown, one for each resolution, batch size and dtype.

    Args:
        results: Rows, of any settings.
        reference: Model that the column ``relative`` divides by.

    Raises:
        ValueError: If no row is of the reference.

    Example:
        >>> from mmevm.analysis.latency import Result, table
        >>> setting = dict(engine='eager', deployed=True, resolution=512, dtype='float32', channels_last=True)
        >>> fast = Result('fast', batch_size=2, seconds=[0.1, 0.1], **setting)
        >>> slow = Result('slow', batch_size=2, seconds=[0.2, 0.2], **setting)
        >>> print(table([fast, slow], reference='slow'))
        512×512, batch 2, float32, forward; relative: time per image divided by that of slow
        <BLANKLINE>
        | model | engine | ms/image | ± % | images/s | relative | params (M) | MFLOPs | memory (MB) |
        |-------|--------|---------:|----:|---------:|---------:|-----------:|-------:|------------:|
        | fast  | eager  |    50.00 | 0.0 |     20.0 |     0.50 |          – |      – |           – |
        | slow  | eager  |   100.00 | 0.0 |     10.0 |     1.00 |          – |      – |           – |
    """
    groups: dict[str, list[tuple[Result, float | None]]] = {}
    for result, ratio in zip(results, relative_times(results, reference), strict=True):
        _, resolution, batch_size, dtype, training = result.setting
        task = 'forward+backward' if training else 'forward'
        title = f'{resolution}×{resolution}, batch {batch_size}, {dtype}, {task}'
        groups.setdefault(title, []).append((result, ratio))
    explanation = f'relative: time per image divided by that of {reference}'
    return '\n\n'.join(f'{title}; {explanation}\n\n{_group(rows)}' for title, rows in groups.items())


def write_json(file: str | Path, results: Sequence[Result], **parts: Any) -> None:
    """Write rows to a file, with everything else that is given.

    Args:
        file: A JSON file; its folder is made if need be.
        results: The rows.
        parts: What else goes into the file under its name: ``arguments``, ``environment``, ``breakdown``.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(parts | dict(results=[asdict(result) for result in results]), indent=1) + '\n')


def read_json(file: str | Path) -> tuple[list[Result], dict[str, Any]]:
    """Read what :func:`write_json` has written: the rows, and the other parts.

    Raises:
        ValueError: If the file is not one of a benchmark.
    """
    names = {field.name for field in fields(Result)}
    try:
        parts = json.loads(Path(file).read_text())
        rows = parts.pop('results')
        return [Result(**{name: value for name, value in row.items() if name in names}) for row in rows], parts
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f'{file} is no file of tools/benchmark_latency.py: {error!r}.') from error


def environment(device: str | torch.device = 'cpu') -> dict[str, Any]:
    """Where a benchmark runs: hardware, versions, threads, load, and the commit of mmevm.

    Args:
        device: Where the models run.
    """
    on_cuda = torch.device(device).type == 'cuda'
    return dict(
        date=time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
        platform=platform.platform(),
        python=platform.python_version(),
        versions={name: found for name in PACKAGES if (found := _version(name))} | dict(torch=torch.__version__),
        commit=git_commit(),
        device=str(device),
        cpu=cpu_name(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        logical_cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        load_average=list(os.getloadavg()) if hasattr(os, 'getloadavg') else None,
        gpu=torch.cuda.get_device_name(device) if on_cuda else None,
        cuda=torch.version.cuda if on_cuda else None,
        cudnn=torch.backends.cudnn.version() if on_cuda else None,
    )


def in_one_line(error: BaseException) -> str:
    """An error's type and the first line of what it says."""
    return ': '.join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def cpu_name() -> str:
    """The processor's name."""
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(':', 1)[1].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """The commit of the checkout that mmevm runs from, with '-dirty' if its files differ; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ['git', '-C', folder, *arguments], capture_output=True, text=True, check=True, timeout=60
        ).stdout.strip()

    try:
        git('ls-files', '--error-unmatch', '../__init__.py')  # not the checkout of somebody who has installed mmevm
        return git('describe', '--always', '--dirty', '--abbrev=40', '--exclude=*')
    except (OSError, subprocess.SubprocessError):
        return None


def _ratio(time: float | None, of_reference: float | None) -> float | None:
    return time / of_reference if time is not None and of_reference else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _group(rows: Sequence[tuple[Result, float | None]]) -> str:
    header = ('model', 'engine', 'ms/image', '± %', 'images/s', 'relative', 'params (M)', 'MFLOPs', 'memory (MB)')
    lines, remarks = [header], []
    for result, ratio in rows:
        lines.append(
            (
                result.model,
                result.engine,
                _number(result.milliseconds, 2),
                _number(result.spread and 100 * result.spread, 1),
                _number(result.images_per_second, 1),
                _number(ratio, 2),
                _number(result.params and result.params / 1e6, 2),
                _number(result.flops and result.flops / 1e6, 0),
                _number(result.peak_memory and result.peak_memory / 1e6, 0),
            )
        )
        name = f'{result.model}, {result.engine}'
        if result.error:
            remarks.append(f'{name}: not measured: {result.error}')
        elif result.asked_batch_size:
            remarks.append(f'{name}: batch {result.batch_size}, as memory did not suffice for more')
        remarks += [f'{name}: {note}' for note in result.notes]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text_columns = 2
    aligned = [
        [cell.ljust(width) if i < text_columns else cell.rjust(width) for i, (cell, width) in enumerate(cells)]
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    rule = ['-' * (width + 2) if i < text_columns else '-' * (width + 1) + ':' for i, width in enumerate(widths)]
    head, *body = (f'| {" | ".join(cells)} |' for cells in aligned)
    text = '\n'.join([head, f'|{"|".join(rule)}|', *body])
    return text + '\n\n' + '\n'.join(remarks) if remarks else text


def _number(value: float | None, digits: int) -> str:
    return '–' if value is None else f'{value:,.{digits}f}'
