"""Rows of a benchmark, their JSON file and their table."""

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
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from mmevm.distributions import DISTRIBUTIONS

# Packages whose versions affect the times.
_PACKAGES = (
    *('mmevm', 'torch', 'torchvision', 'timm', 'numpy', 'onnx', 'onnxscript', 'onnxruntime', 'onnxruntime-gpu'),
    *('openvino', 'triton'),
    *(name for names in DISTRIBUTIONS.values() for name in names),
)


@dataclass
class Result:
    """One row of a benchmark: one model with one engine in one setting.

    Attributes:
        model: Name of the model: 'm4', 'shvit_s4', 'configs/….py'.
        engine: One of ``mmevm.analysis.latency.ENGINES``.
        deployed: Whether models were switched to deploy mode.
        resolution: Side of the images in pixels.
        batch_size: Images per call, after any halving.
        dtype: One of ``mmevm.analysis.latency.DTYPES``.
        channels_last: Whether weights and images were in channels_last.
        training: Whether a call was forward and backward.
        params: Parameters, before deploy mode.
        flops: Multiply-accumulates per image, before deploy mode.
        peak_memory: Bytes for weights, batch and activations.
        seconds: Times of single calls, in the order of measurement.
        error: Why there are no times.
        asked_batch_size: The requested images per call, if they did not fit into memory.
        notes: Remarks for the reader.
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
    asked_batch_size: int | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def milliseconds(self) -> float | None:
        """Median time per image in milliseconds; None without times."""
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
        """Images per second at the median time; None without times."""
        return 1e3 / self.milliseconds if self.milliseconds else None

    @property
    def setting(self) -> tuple:
        """What rows must share to be compared."""
        batch_size = self.asked_batch_size or self.batch_size
        return self.engine, self.resolution, batch_size, self.dtype, self.training


def relative_times(results: Sequence[Result], reference: str) -> list[float | None]:
    """Divide times per image by those of a reference model with the same engine and setting.

    Args:
        results: Rows of any settings.
        reference: Name of the reference model.

    Returns:
        A ratio for each row, below 1 if it is faster than the reference; None if one of the two has no times.

    Raises:
        ValueError: If there is no row of the reference.
    """
    times = {result.setting: result.milliseconds for result in results if result.model == reference}
    if not times:
        models = ', '.join(dict.fromkeys(result.model for result in results))
        raise ValueError(f'reference={reference!r} is not one of the measured models: {models}.')
    ratios: list[float | None] = []
    for result in results:
        own, other = result.milliseconds, times.get(result.setting)
        ratios.append(own / other if own and other else None)
    return ratios


def table(results: Sequence[Result], reference: str) -> str:
    """Return the rows as Markdown tables, one for each resolution, batch size and dtype.

    Args:
        results: Rows of any settings.
        reference: Model that the column ``relative`` divides by.

    Raises:
        ValueError: If there is no row of the reference.

    Example:
        >>> from mmevm.analysis.latency import Result, table
        >>> setting = dict(engine='eager', deployed=True, resolution=512, dtype='float32', channels_last=True)
        >>> fast = Result('fast', batch_size=2, seconds=[0.1, 0.1], **setting)
        >>> slow = Result('slow', batch_size=2, seconds=[0.2, 0.2], **setting)
        >>> print(table([fast, slow], reference='slow'))
        512×512, batch 2, float32, forward; relative: time per image divided by that of slow
        <BLANKLINE>
        | model | engine | ms/image | ± % | images/s | relative | params (M) | MFLOPs | memory (MB) |
        |-------|--------|----------|-----|----------|----------|------------|--------|-------------|
        | fast  | eager  |    50.00 | 0.0 |     20.0 |     0.50 |          – |      – |           – |
        | slow  | eager  |   100.00 | 0.0 |     10.0 |     1.00 |          – |      – |           – |
    """
    header = ('model', 'engine', 'ms/image', '± %', 'images/s', 'relative', 'params (M)', 'MFLOPs', 'memory (MB)')
    groups: dict[str, list[tuple[str, ...]]] = {}
    remarks: dict[str, list[str]] = {}
    for result, ratio in zip(results, relative_times(results, reference), strict=True):
        _, resolution, batch_size, dtype, training = result.setting
        task = 'forward+backward' if training else 'forward'
        title = f'{resolution}×{resolution}, batch {batch_size}, {dtype}, {task}'
        cells = [
            _number(result.milliseconds, 2),
            _number(result.spread, 1, 1e-2),
            _number(result.images_per_second, 1),
            _number(ratio, 2),
            _number(result.params, 2, 1e6),
            _number(result.flops, 0, 1e6),
            _number(result.peak_memory, 0, 1e6),
        ]
        groups.setdefault(title, []).append((result.model, result.engine, *cells))
        notes = list(result.notes)
        if result.error:
            notes.insert(0, f'not measured: {result.error}')
        elif result.asked_batch_size:
            notes.insert(0, f'batch {result.batch_size}, as larger ones did not fit into memory')
        remarks.setdefault(title, []).extend(f'{result.model}, {result.engine}: {note}' for note in notes)
    blocks = []
    for title, rows in groups.items():
        blocks.append(f'{title}; relative: time per image divided by that of {reference}')
        blocks.append(format_table(header, rows, text_columns=2))
        blocks += ['\n'.join(remarks[title])] if remarks[title] else []
    return '\n\n'.join(blocks)


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """Return a Markdown table; the columns after the first ``text_columns`` are aligned to the right."""
    grid = Table(box=MARKDOWN)
    for i, title in enumerate(header):
        grid.add_column(title, justify='left' if i < text_columns else 'right', no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    console = Console(width=1000, markup=False, emoji=False, highlight=False, color_system=None)
    with console.capture() as capture:
        console.print(grid)
    return capture.get().strip()


def write_json(file: str | Path, results: Sequence[Result], **parts: Any) -> None:
    """Write rows to a JSON file.

    Args:
        file: The file; its folder is created if needed.
        results: The rows.
        parts: Further entries of the file: ``arguments``, ``environment``, ``breakdown``.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(parts | dict(results=[asdict(result) for result in results]), indent=1) + '\n')


def read_json(file: str | Path) -> tuple[list[Result], dict[str, Any]]:
    """Read a file of :func:`write_json`: the rows, and the other entries.

    Raises:
        ValueError: If it is not such a file.
    """
    names = {field.name for field in fields(Result)}
    try:
        parts = json.loads(Path(file).read_text())
        rows = parts.pop('results')
        return [Result(**{name: value for name, value in row.items() if name in names}) for row in rows], parts
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f'{file} was not written by tools/benchmark_latency.py: {error!r}.') from error


def environment(device: str | torch.device = 'cpu') -> dict[str, Any]:
    """Return what a benchmark ran on: hardware, versions, threads, load, and the commit of mmevm.

    Args:
        device: Where the models run.
    """
    on_cuda = torch.device(device).type == 'cuda'
    return dict(
        date=time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
        platform=platform.platform(),
        python=platform.python_version(),
        versions={name: found for name in _PACKAGES if (found := _version(name))} | dict(torch=torch.__version__),
        commit=git_commit(),
        device=str(device),
        cpu=_cpu_name(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        logical_cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        load_average=list(os.getloadavg()) if hasattr(os, 'getloadavg') else None,
        gpu=torch.cuda.get_device_name(device) if on_cuda else None,
        cuda=torch.version.cuda if on_cuda else None,
        cudnn=torch.backends.cudnn.version() if on_cuda else None,
    )


def summarize_error(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    return ': '.join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def git_commit() -> str | None:
    """Return the commit of mmevm's checkout, with '-dirty' if files differ; None if mmevm runs from elsewhere."""

    def git(*arguments: str) -> str:
        command = ['git', '-C', str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    try:
        git('ls-files', '--error-unmatch', '__init__.py')  # not another project's checkout with mmevm in its venv
        return git('describe', '--always', '--dirty', '--abbrev=40', '--exclude=*')
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    cpuinfo = Path('/proc/cpuinfo')
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(':', 1)[1].strip() for line in lines if line.startswith('model name'))
    return next(names, platform.processor() or platform.machine())


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _number(value: float | None, digits: int, unit: float = 1) -> str:
    return '–' if value is None else f'{value / unit:,.{digits}f}'
