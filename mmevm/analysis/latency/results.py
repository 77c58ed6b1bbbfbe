"""Rows of a benchmark, their JSON file and their table."""

import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from mmevm.distributions import DISTRIBUTIONS, installed_version
from mmevm.tables import format_table

from .timing import is_cuda

_PACKAGES = ('mmevm', 'timm', 'numpy', 'onnxruntime', 'openvino', *DISTRIBUTIONS['onedl'], *DISTRIBUTIONS['openmmlab'])


@dataclass
class Result:
    """One row of a benchmark: one model with one engine in one setting.

    Attributes:
        deployed: Whether models were switched to deploy mode.
        resolution: Height of the images in pixels.
        width: Width of the images in pixels; None if they are square.
        batch_size: Images per call, after any halving.
        training: Whether a call was forward and backward.
        params: Parameters, before deploy mode.
        flops: Multiply-accumulates per image, before deploy mode.
        peak_memory: Bytes for weights, batch and activations.
        seconds: Times of single calls, in the order of measurement.
        stages: The same of the stages 'preprocessing' and 'network' of a whole detector by name.
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
    width: int | None = None
    stages: dict[str, list[float]] = field(default_factory=dict)

    @property
    def size(self) -> str:
        """Height and width of the images, for messages."""
        return f'{self.resolution}×{self.width or self.resolution}'

    @property
    def milliseconds(self) -> float | None:
        """Median time per image in milliseconds; None without times."""
        return 1e3 * statistics.median(self.seconds) / self.batch_size if self.seconds else None

    @property
    def stage_milliseconds(self) -> dict[str, float]:
        """Median times per image in milliseconds of the stages of a detector. Post-processing is the rest of a call."""
        if not (self.seconds and self.stages):
            return {}
        rest = [whole - sum(parts) for whole, *parts in zip(self.seconds, *self.stages.values(), strict=True)]
        stages = {**self.stages, 'post-processing': rest}
        return {name: 1e3 * statistics.median(times) / self.batch_size for name, times in stages.items()}

    @property
    def spread(self) -> float | None:
        """Half the interquartile range relative to the median; None with fewer than two times."""
        if len(self.seconds) < 2:
            return None
        lower, median, upper = statistics.quantiles(self.seconds, n=4, method='inclusive')
        return (upper - lower) / 2 / median

    @property
    def setting(self) -> tuple:
        """What rows must share to be compared."""
        batch_size = self.asked_batch_size or self.batch_size
        return self.engine, self.size, batch_size, self.dtype, self.training


def relative_times(results: Sequence[Result], reference: str) -> list[float | None]:
    """Divide times per image by those of a reference model with the same engine and setting.

    Returns:
        A ratio for each row, below 1 if it is faster than the reference; None if one of the two has no times.
    """
    times = {result.setting: result.milliseconds for result in results if result.model == reference}
    pairs = [(result.milliseconds, times.get(result.setting)) for result in results]
    return [time / other if time and other else None for time, other in pairs]


def table(results: Sequence[Result], reference: str) -> str:
    """Return the rows as Markdown tables, one for each resolution, batch size and dtype, with the rows' notes.

    The column ``relative`` divides by the times of the reference model.
    """
    stages = list(dict.fromkeys(name for result in results for name in result.stage_milliseconds))
    header = (
        *('model', 'engine', 'ms/image', '± %', 'images/s', 'relative', *stages),
        *('params (M)', 'MFLOPs', 'memory (MB)'),
    )
    tables: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    remarks: dict[str, list[str]] = defaultdict(list)
    for result, ratio in zip(results, relative_times(results, reference), strict=True):
        _, size, batch_size, dtype, training = result.setting
        task = 'forward+backward' if training else 'forward'
        title = f'{size}, batch {batch_size}, {dtype}, {task}'
        columns = [
            (result.milliseconds, 1, 2),  # value, unit, decimals
            (result.spread, 1e-2, 1),
            (result.milliseconds and 1e3 / result.milliseconds, 1, 1),
            (ratio, 1, 2),
            *((result.stage_milliseconds.get(name), 1, 2) for name in stages),
            (result.params, 1e6, 2),
            (result.flops, 1e6, 0),
            (result.peak_memory, 1e6, 0),
        ]
        cells = ['–' if value is None else f'{value / unit:,.{decimals}f}' for value, unit, decimals in columns]
        tables[title].append((result.model, result.engine, *cells))
        notes = list(result.notes)
        if result.error:
            notes.insert(0, f'not measured: {result.error}')
        elif result.asked_batch_size:
            notes.insert(0, f'batch {result.batch_size}, as larger ones did not fit into memory')
        remarks[title] += [f'{result.model}, {result.engine}: {note}' for note in notes]
    blocks = []
    for title, rows in tables.items():
        blocks.append(f'{title}; relative: time per image divided by that of {reference}')
        blocks.append(format_table(header, rows, text_columns=2))
        blocks.append('\n'.join(remarks[title]))
    return '\n\n'.join(filter(None, blocks))


def write_json(file: Path, results: Sequence[Result], **parts: Any) -> None:
    """Write rows, and ``parts`` as further entries, to a JSON file; its folder is created if needed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(parts | dict(results=[asdict(result) for result in results]), indent=1) + '\n')


def read_json(file: str | Path) -> tuple[list[Result], dict[str, Any]]:
    """Read a file of :func:`write_json`: the rows, and the other entries."""
    names = {field.name for field in fields(Result)}
    parts = json.loads(Path(file).read_text())
    rows = parts.pop('results')
    return [Result(**{name: value for name, value in row.items() if name in names}) for row in rows], parts


def environment(device: str = 'cpu') -> dict[str, Any]:
    """Return what a benchmark on this device ran on: hardware, versions, threads, load, and the commit of mmevm."""
    versions = {name: version for name in _PACKAGES if (version := installed_version(name))}
    return dict(
        date=time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
        commit=git_commit(),
        versions=dict(versions, torch=torch.__version__),
        cpu=_cpu_name(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        load_average=os.getloadavg() if hasattr(os, 'getloadavg') else None,
        gpu=torch.cuda.get_device_name(device) if is_cuda(device) else None,
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
    names = re.findall(r'model name\s*: (.*)', cpuinfo.read_text() if cpuinfo.exists() else '')
    return names[0] if names else platform.processor()
