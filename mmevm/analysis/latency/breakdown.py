"""Break down the time of an eager forward pass by module and by operator group, with ``torch.profiler``."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from mmevm.analysis.complexity import measure_complexity
from mmevm.analysis.operators import OTHER, operator_group
from mmevm.tables import format_table

from .timing import synchronize, time_call

# Time on the CPU that no operator takes: Python code and PyTorch's calls of operators.
OUTSIDE = 'outside operators'

_RANGE = 'mmevm.breakdown:'


@dataclass(frozen=True)
class Part:
    """Time and FLOPs of a module, or of the same module of several blocks, without the parts inside it.

    Attributes:
        name: Name of the module; '' is the whole model. A '*' stands for all entries of a list.
        milliseconds: Time of one pass over the batch.
        flops: Multiply-accumulates of the batch.
        groups: Milliseconds by operator group; operators of the group 'other' are listed by name.
    """

    name: str
    milliseconds: float
    flops: int
    groups: dict[str, float]


@dataclass(frozen=True)
class Breakdown:
    """Where the time of a forward pass goes.

    Attributes:
        input_shape: Shape of the batch, (B, C, H, W).
        milliseconds: Sum of the parts. On a GPU it is the time of the kernels.
        uninstrumented: Milliseconds of a pass without the profiler.
        parts: Modules with times, in the order of their definition.
    """

    input_shape: tuple[int, ...]
    milliseconds: float
    uninstrumented: float
    parts: tuple[Part, ...]

    def table(self) -> str:
        """Return the times by part and by operator group as Markdown tables."""
        groups: dict[str, float] = defaultdict(float)
        for part in self.parts:
            for group, milliseconds in part.groups.items():
                groups[group] += milliseconds

        def row(name: str, milliseconds: float, *others: str) -> tuple[str, ...]:
            return name, f'{milliseconds:.3f}', f'{milliseconds / self.milliseconds:.1%}', *others

        parts = [row(part.name or 'model', part.milliseconds, f'{part.flops / 1e6:.1f}') for part in self.parts]
        parts.append(row('sum', self.milliseconds, f'{sum(part.flops for part in self.parts) / 1e6:.1f}'))
        by_group = [row(*item) for item in sorted(groups.items(), key=lambda item: -item[1])]
        return (
            f'{self.milliseconds:.2f} ms for a batch of {self.input_shape[0]} with the profiler, '
            f'{self.uninstrumented:.2f} ms without it. A part does not include the parts inside it.\n\n'
            f'{format_table(("part", "ms", "share", "MMAC"), parts)}\n\n'
            f'{format_table(("operator group", "ms", "share"), by_group)}'
        )


def break_down(model: nn.Module, x: Tensor, rounds: int = 10) -> Breakdown:
    """Measure where the time of an eager forward pass goes.

    Times are attributed to the innermost part. Lists, their entries (stages, blocks) and modules that contain nested
    lists are split up into their children; other modules, such as a block's ``mixer``, are parts as a whole.

    Args:
        model: A module in eval mode that takes one tensor, on the device of ``x``.
        x: Its input.
        rounds: Number of passes to average, after a warm-up.

    Raises:
        ValueError: If the model is in training mode or returns no tensor.

    Example:
        >>> import torch
        >>> from mmevm.analysis.latency import break_down
        >>> from mmevm.models import EfficientViM
        >>> breakdown = break_down(EfficientViM('m1').eval(), torch.rand(1, 3, 64, 64), rounds=2)
        >>> [part.name for part in breakdown.parts][:4]
        ['', 'patch_embed', 'stages.*', 'stages.*.blocks.*']
    """
    if model.training:
        raise ValueError(f'{type(model).__name__} is in training mode. Call eval() before.')
    names = _part_names(model)
    with torch.no_grad():
        with torch.autocast(x.device.type, enabled=False):  # its casts cost no multiply-accumulates
            # a copy, as the counter does not remove its hooks if the model raises
            complexity = measure_complexity(deepcopy(model), x.to(next(model.parameters(), x)))
        _profile(model, x, names, 1)  # warm up the model and the profiler
        uninstrumented = mean(time_call(partial(model, x), x.device) for _ in range(rounds))
        times = _profile(model, x, names, rounds)
    flops = dict.fromkeys(map(_replace_indices, names), 0)
    for name in names:
        flops[_replace_indices(name)] += complexity.by_module[name][1]
        if name:
            parent = max((other for other in names if name.startswith(f'{other}.')), key=len, default='')
            flops[_replace_indices(parent)] -= complexity.by_module[name][1]
    parts = [Part(name, sum(times[name].values()), flops[name], times[name]) for name in flops if name in times]
    milliseconds = sum(part.milliseconds for part in parts)
    return Breakdown(tuple(x.shape), milliseconds, 1e3 * uninstrumented, tuple(parts))


# An index in a module's name. timm's feature extractors flatten 'stages.0' to 'stages_0'.
_INDEX = r'(?:(?<=[._])|^)\d+(?=\.|$)'


def _replace_indices(name: str) -> str:
    return re.sub(_INDEX, '*', name)


def _part_names(model: nn.Module) -> list[str]:
    """Return the names of the modules to tell apart, parents before children."""
    names: list[str] = []
    whole: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Identity) or any(name.startswith(f'{other}.') for other in whole):
            continue
        names.append(name)
        is_list = isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        has_nested_lists = any(len(re.findall(_INDEX, inner)) > 1 for inner, _ in module.named_modules())
        if name and not is_list and not has_nested_lists and not re.search(f'{_INDEX}$', name):
            whole.append(name)
    return names


def _profile(model: nn.Module, x: Tensor, names: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    """Return milliseconds of one pass by part and operator group."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if x.is_cuda else [])]
    with _record_modules(model, names), profile(activities=activities) as profiler:
        for _ in range(rounds):
            model(x)
            synchronize(x.device)
    times: dict[str, dict[str, float]] = {}
    for event in profiler.events():
        microseconds = event.self_device_time_total if x.is_cuda else event.self_cpu_time_total
        if event.device_type != DeviceType.CPU or event.is_async or microseconds <= 0:
            continue
        part = event
        while part and not part.name.startswith(_RANGE):
            part = part.cpu_parent
        if part:
            group = OUTSIDE if event is part else operator_group(event.name.rpartition('::')[2])
            group = f'{OTHER}: {event.name}' if group == OTHER else group
            groups = times.setdefault(part.name.removeprefix(_RANGE), {})
            groups[group] = groups.get(group, 0) + microseconds / 1e3 / rounds
    return times


@contextmanager
def _record_modules(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Record a range in the profile for each call of these modules."""
    running = []

    def enter(name: str, module: nn.Module, args: tuple) -> None:
        running.append(record_function(_RANGE + _replace_indices(name)))
        running[-1].__enter__()

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        running.pop().__exit__(None, None, None)

    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(partial(enter, name)))
            hooks.enter_context(module.register_forward_hook(leave, always_call=True))
        yield
