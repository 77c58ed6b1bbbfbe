"""Break down the time of an eager forward pass by module and by operator group, with ``torch.profiler``."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from mmevm.analysis.complexity import measure_complexity
from mmevm.analysis.operators import OTHER, operator_group

from .results import format_table
from .timing import synchronize, time_call

# Names of token mixers in common backbones.
MIXERS = ('mixer', 'token_mixer', 'attn')

# Time on the CPU that no operator takes: Python code and PyTorch's calls of operators.
OUTSIDE = 'outside operators'

_RANGE = 'mmevm.breakdown:'
_WARM_UP = 3  # passes


@dataclass(frozen=True)
class Part:
    """Time and FLOPs of a module, or of the same module of several blocks.

    Attributes:
        name: Name of the module; '' is the whole model. A '*' stands for all entries of a list.
        self_only: Whether other parts are inside this module. Their time and FLOPs are not included.
        milliseconds: Time of one pass over the batch.
        flops: Multiply-accumulates of the batch.
        compute_bound: Milliseconds that the multiply-accumulates take at the rate of a large matrix product.
        groups: Milliseconds by operator group; operators of the group 'other' are listed by name.
    """

    name: str
    self_only: bool
    milliseconds: float
    flops: int
    compute_bound: float
    groups: dict[str, float]


@dataclass(frozen=True)
class Breakdown:
    """Where the time of a forward pass goes.

    Attributes:
        device: Type of the device.
        input_shape: Shape of the batch, (B, C, H, W).
        rounds: Number of passes that each time is the median of.
        rate: Multiply-accumulates per second of a large matrix product.
        milliseconds: Sum of the parts. On a GPU it is the time of the kernels.
        uninstrumented: Milliseconds of a pass without the profiler.
        parts: Modules with times, in the order of their definition.
    """

    device: str
    input_shape: tuple[int, ...]
    rounds: int
    rate: float
    milliseconds: float
    uninstrumented: float
    parts: tuple[Part, ...]

    def grouped(self) -> list[Part]:
        """Return the parts summed over all stages and blocks."""
        members = defaultdict(list)
        for part in self.parts:
            members[_replace_indices(part.name), part.self_only].append(part)
        return [
            Part(
                name,
                self_only,
                sum(part.milliseconds for part in parts),
                sum(part.flops for part in parts),
                sum(part.compute_bound for part in parts),
                _sum_groups(parts),
            )
            for (name, self_only), parts in members.items()
        ]

    def table(self) -> str:
        """Return the times by part, summed over stages and blocks, and by operator group, as Markdown."""
        rows = [
            (
                f'{part.name or "model"}{" (self)" if part.self_only else ""}',
                f'{part.milliseconds:.3f}',
                f'{part.milliseconds / self.milliseconds:.1%}',
                f'{part.flops / 1e6:.1f}',
                f'{part.compute_bound:.3f}',
            )
            for part in self.grouped()
        ]
        flops, bound = (sum(getattr(part, name) for part in self.parts) for name in ('flops', 'compute_bound'))
        rows.append(('sum', f'{self.milliseconds:.3f}', '100.0%', f'{flops / 1e6:.1f}', f'{bound:.3f}'))
        by_part = format_table(('part', 'ms', 'share', 'MMAC', 'compute bound (ms)'), rows)

        columns = [_sum_groups(self.parts), _sum_groups([part for part in self.parts if _is_in_mixer(part.name)])]
        group_rows = [
            (name, *(text for times in columns for text in _time_and_share(times, name)))
            for name in sorted(columns[0], key=columns[0].__getitem__, reverse=True)
        ]
        by_group = format_table(('operator group', 'ms', 'share', 'in token mixers (ms)', 'share'), group_rows)
        return (
            f'{self.milliseconds:.2f} ms for a batch of {self.input_shape[0]} with the profiler, '
            f'{self.uninstrumented:.2f} ms without it; medians of {self.rounds} passes on {self.device}. '
            f'Compute bound: at {self.rate / 1e9:.1f} GMAC/s, the rate of a large matrix product.\n\n'
            f'{by_part}\n\n{by_group}'
        )

    def as_dict(self) -> dict[str, Any]:
        """Return everything in a form that JSON can hold."""
        return asdict(self)


def break_down(model: nn.Module, x: Tensor, rounds: int = 10) -> Breakdown:
    """Measure where the time of an eager forward pass goes.

    Times are attributed to the innermost part. Lists, their entries (stages, blocks) and modules that contain nested
    lists are split up into their children; other modules, such as a block's ``mixer``, are parts as a whole.

    Args:
        model: A module in eval mode that takes one tensor, on the device of ``x``.
        x: Its input. Autocast and memory formats apply as usual.
        rounds: Number of passes to measure, after a warm-up.

    Raises:
        ValueError: If the model is in training mode or returns no tensor.

    Example:
        >>> import torch
        >>> from mmevm.analysis.latency import break_down
        >>> from mmevm.models import EfficientViM
        >>> breakdown = break_down(EfficientViM('m1').eval(), torch.rand(1, 3, 64, 64), rounds=2)
        >>> [part.name for part in breakdown.grouped()][:4]
        ['', 'patch_embed', 'stages.*', 'stages.*.blocks.*']
    """
    if model.training:
        raise ValueError(f'{type(model).__name__} is in training mode. Call eval() before.')
    names = _part_names(model)
    with torch.no_grad():
        with torch.autocast(x.device.type, enabled=False):  # its casts cost no multiply-accumulates
            # a copy, as the counter does not remove its hooks if the model raises
            complexity = measure_complexity(deepcopy(model), x.to(next(model.parameters(), x)))
        rate = _matmul_rate(x)
        for _ in range(_WARM_UP):
            model(x)
        uninstrumented = median(time_call(partial(model, x), x.device) for _ in range(rounds))
        passes = _profile(model, x, names, 1 + rounds)[1:]  # the first one includes the profiler's setup
    flops = _self_flops({name: complexity.by_module[name][1] for name in names})
    parts = []
    for name in names:
        groups = {}
        for group in dict.fromkeys(group for times in passes for group in times[name]):
            groups[group] = median(times[name].get(group, 0) for times in passes)
        if groups:
            has_parts = any(_is_inside(other, name) for other in names if other != name)
            bound = 1e3 * flops[name] / rate
            parts.append(Part(name, has_parts, sum(groups.values()), flops[name], bound, groups))
    return Breakdown(
        device=x.device.type,
        input_shape=tuple(x.shape),
        rounds=rounds,
        rate=rate,
        milliseconds=sum(part.milliseconds for part in parts),
        uninstrumented=1e3 * uninstrumented,
        parts=tuple(parts),
    )


def _part_names(model: nn.Module) -> list[str]:
    """Return the names of the modules to tell apart, parents before children."""
    names: list[str] = []
    whole: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Identity) or any(_is_inside(name, other) for other in whole):
            continue
        names.append(name)
        is_list = isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        has_nested_lists = any(len(re.findall(_INDEX, inner)) > 1 for inner, _ in module.named_modules())
        if name and not is_list and not has_nested_lists and not re.search(f'{_INDEX}$', name):
            whole.append(name)
    return names


# An index in a module's name. timm's feature extractors flatten 'stages.0' to 'stages_0'.
_INDEX = r'(?:(?<=[._])|^)\d+(?=\.|$)'


def _replace_indices(name: str) -> str:
    return re.sub(_INDEX, '*', name)


def _is_inside(name: str, parent: str) -> bool:
    return not parent or name == parent or name.startswith(f'{parent}.')


def _is_in_mixer(name: str) -> bool:
    return any(word in MIXERS for word in name.split('.'))


def _self_flops(flops: dict[str, int]) -> dict[str, int]:
    """Subtract from each module's FLOPs those of the parts directly inside it."""
    result = dict(flops)
    for name in flops:
        parents = [other for other in flops if other != name and _is_inside(name, other)]
        if parents:
            result[max(parents, key=len)] -= flops[name]
    return result


def _profile(model: nn.Module, x: Tensor, names: Sequence[str], rounds: int) -> list[dict[str, dict[str, float]]]:
    """Return milliseconds of each pass by part and operator group."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if x.is_cuda else [])]
    with _record_modules(model, names), profile(activities=activities) as profiler:
        for _ in range(rounds):
            model(x)
            synchronize(x.device)
    passes: dict[float, dict[str, dict[str, float]]] = {}  # by start time
    for event in profiler.events():
        microseconds = _device_time(event) if x.is_cuda else event.self_cpu_time_total
        if event.device_type != DeviceType.CPU or event.is_async or microseconds <= 0:
            continue
        ranges = [parent for parent in _with_parents(event) if parent.name.startswith(_RANGE)]
        if ranges:  # from the innermost part to the model
            group = OUTSIDE if event is ranges[0] else operator_group(event.name.rpartition('::')[2])
            group = f'{OTHER}: {event.name}' if group == OTHER else group
            times = passes.setdefault(ranges[-1].time_range.start, {name: defaultdict(float) for name in names})
            times[ranges[0].name.removeprefix(_RANGE)][group] += microseconds / 1e3
    return [passes[start] for start in sorted(passes)]


def _with_parents(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


@contextmanager
def _record_modules(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Record a range in the profile for each call of these modules."""
    running = []

    def enter(name: str, module: nn.Module, args: tuple) -> None:
        running.append(record_function(_RANGE + name))
        running[-1].__enter__()

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        running.pop().__exit__(None, None, None)

    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(partial(enter, name)))
            hooks.enter_context(module.register_forward_hook(leave, always_call=True))
        yield


def _device_time(event: Any) -> float:
    name = 'self_device_time_total' if hasattr(event, 'self_device_time_total') else 'self_cuda_time_total'  # torch<2.4
    return getattr(event, name)


def _matmul_rate(x: Tensor) -> float:
    """Return the multiply-accumulates per second of a large matrix product, in the dtype that autocast sets."""
    small = x.new_ones(1, 1)
    side = 8192 if x.is_cuda else 1024
    factor = torch.rand(side, side, device=x.device).to((small @ small).dtype)
    return side**3 / median([time_call(partial(torch.mm, factor, factor), x.device) for _ in range(6)][1:])


def _sum_groups(parts: Sequence[Part]) -> dict[str, float]:
    times: dict[str, float] = defaultdict(float)
    for part in parts:
        for name, milliseconds in part.groups.items():
            times[name] += milliseconds
    return dict(times)


def _time_and_share(times: dict[str, float], name: str) -> tuple[str, str]:
    milliseconds = times.get(name, 0)
    return f'{milliseconds:.3f}', f'{milliseconds / (sum(times.values()) or 1):.1%}'
