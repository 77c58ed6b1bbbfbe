"""Where the time of a forward pass goes: by part, against what the machine could do, and by kind of operation.

The paper's Figure 3 for any model. Convolutions and matrix products are all that FLOPs count; the rest of the time is
moving bytes. So each part is set against its floor: the longer of the times that its multiply-accumulates and its bytes
take at rates which are measured on the same machine just before.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._pytree import tree_flatten

from mmevm.analysis.complexity import POINTWISE, VIEW, class_of_operator, measure_complexity

from .timing import is_cuda, synchronise, time_call

WARM_UP = 3  # passes before any that count

# What the models of this field call a token mixer.
MIXERS = ('mixer', 'token_mixer', 'attn')

# Modules that hand on what they are given in eval mode: no parts, as they move nothing.
IDLE = (nn.Identity, nn.Flatten, nn.modules.dropout._DropoutNd)

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

# Kinds of operations by the names of the profiler, without namespace and underscores at the ends. What torch itself
# tags as pointwise is elementwise, and what it declares as a view is a change of layout: only the others are listed. A
# fused attention counts as matrix products, with the softmax that is in it.
MATRIX_PRODUCTS, CONVOLUTIONS, NORMALISATION = 'matrix products', 'convolutions', 'normalisation'
SOFTMAX, ELEMENTWISE, POOLING = 'softmax', 'elementwise', 'sums and pooling'
LAYOUT, BETWEEN, OTHER = 'copies and layout changes', 'between operators', 'other'
KINDS = {
    MATRIX_PRODUCTS: (
        *('addbmm', 'addmm', 'addmv', 'baddbmm', 'bmm', 'dot', 'einsum', 'linear', 'matmul', 'mm', 'mv'),
        *('addmm_activation', 'linear_pointwise', 'mkl_linear', 'mkldnn_linear', 'scaled_mm'),
        *('scaled_dot_product_attention', 'scaled_dot_product_attention_math', 'scaled_dot_product_cudnn_attention'),
        *('scaled_dot_product_efficient_attention', 'scaled_dot_product_flash_attention'),
        *('scaled_dot_product_flash_attention_for_cpu', 'scaled_dot_product_fused_attention_overrideable'),
        *('cudnn_attention_forward', 'efficient_attention_forward', 'flash_attention_forward'),
    ),
    CONVOLUTIONS: (
        *('conv1d', 'conv2d', 'conv3d', 'conv_transpose2d', 'convolution', 'convolution_overrideable'),
        *('conv_depthwise2d', 'convolution_pointwise', 'cudnn_convolution', 'cudnn_convolution_relu'),
        *('cudnn_convolution_add_relu', 'cudnn_convolution_transpose', 'mkldnn_convolution', 'miopen_convolution'),
        *('miopen_depthwise_convolution', 'nnpack_spatial_convolution', 'slow_conv2d_forward', 'thnn_conv2d'),
        *('nnpack_available', 'im2col', 'deform_conv2d'),
    ),
    NORMALISATION: (
        *('batch_norm', 'batch_norm_impl_index', 'batch_norm_no_update', 'batch_norm_with_update'),
        *('cudnn_batch_norm', 'miopen_batch_norm', 'native_batch_norm', 'native_batch_norm_legit'),
        *('native_batch_norm_legit_no_training', 'group_norm', 'native_group_norm', 'instance_norm'),
        *('layer_norm', 'native_layer_norm', 'rms_norm', 'fused_rms_norm', 'linalg_vector_norm', 'norm'),
    ),
    SOFTMAX: ('log_softmax', 'softmax', 'softmax_cpu', 'softmax_cuda'),
    ELEMENTWISE: ('dropout', 'glu', 'prelu', 'relu6', 'silu', 'hardswish', 'hardsigmoid', 'lerp'),
    POOLING: (
        *('adaptive_avg_pool1d', 'adaptive_avg_pool2d', 'adaptive_max_pool2d', 'avg_pool2d', 'max_pool2d'),
        *('max_pool2d_with_indices', 'mkldnn_max_pool2d'),
        *('amax', 'amin', 'cumsum', 'max', 'mean', 'min', 'std', 'std_mean', 'sum', 'var', 'var_mean'),
    ),
    LAYOUT: (
        *('cat', 'clone', 'constant_pad_nd', 'contiguous', 'copy', 'pad', 'reflection_pad2d', 'reorder', 'repeat'),
        *('stack', 'to', 'to_copy', 'to_dense', 'to_mkldnn', 'mkldnn_reorder_conv2d_weight'),
        *('channel_shuffle', 'flip', 'index', 'index_select', 'pixel_shuffle', 'pixel_unshuffle', 'roll'),
        *('empty', 'empty_like', 'empty_strided', 'fill', 'new_empty', 'new_zeros', 'resize', 'zeros', 'zeros_like'),
        *('as_strided', 'chunk', 'flatten', 'meshgrid', 'promote_types', 'reshape', 'result_type', 'set'),
        *('unsafe_split', 'unsafe_view'),
    ),
}
_KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}

Operation = tuple[str, str | None, bool]  # its kind, its name if that is OTHER, whether within a mixer

_ROUND = 'mmevm.breakdown.round'
_MIXER = 'mmevm.breakdown.mixer'


@dataclass(frozen=True)
class Part:
    """A part of a model, or several taken together.

    Attributes:
        name: Name of the module; '' is the model. A '*' stands for every entry of a list.
        kind: Class of the module.
        own: Whether this is what a module does itself, between its parts, such as adding shortcuts.
        milliseconds: Of one pass over the batch, all calls together.
        flops: Multiply-accumulates of the batch.
        bytes: What has to be moved at least: inputs, outputs and weights, each once. None where ``own``, as what
            happens between parts has no inputs to be seen.
        floor: Milliseconds below which the part cannot come while ``bytes`` come from memory; None where ``own``. From
            a cache a small map can come faster than that.
        bound: What sets the floor, 'arithmetic' or 'memory'; None where ``own``.
    """

    name: str
    kind: str
    own: bool
    milliseconds: float
    flops: int
    bytes: int | None
    floor: float | None
    bound: str | None

    @property
    def label(self) -> str:
        """Name for a reader."""
        name = self.name or self.kind
        return f'{name}, itself' if self.own else name


@dataclass(frozen=True)
class Breakdown:
    """Where the time of a forward pass goes.

    Attributes:
        device: Name of the device.
        dtype: Of matrix products, 'float16' and so on.
        input_shape: Shape of the batch, (B, C, H, W).
        rounds: How many passes each number is the median of.
        rate: Multiply-accumulates a second of a large matrix product.
        bandwidth: Bytes a second of a large copy, read and written.
        milliseconds: Of one pass with a clock around every part: the sum of the parts' medians.
        unobserved: Milliseconds of one pass without it. Parts that wait for the device one by one cannot overlap, so
            the difference is what looking costs.
        parts: All parts in the order in which they were called. Their times add up to ``milliseconds``.
        mixers: Names of the parts that are token mixers.
        kinds: Milliseconds of each kind of operation, as torch's profiler has them, which slows short operators down.
            On a GPU these are the kernels' times, with nothing between operators.
        mixer_kinds: The same within token mixers.
        unknown: Milliseconds of each operator that is under 'other'.
    """

    device: str
    dtype: str
    input_shape: tuple[int, ...]
    rounds: int
    rate: float
    bandwidth: float
    milliseconds: float
    unobserved: float
    parts: tuple[Part, ...]
    mixers: tuple[str, ...]
    kinds: dict[str, float] = field(default_factory=dict)
    mixer_kinds: dict[str, float] = field(default_factory=dict)
    unknown: dict[str, float] = field(default_factory=dict)

    def grouped(self, keep: int = 1) -> tuple[Part, ...]:
        """Parts of the same name in different blocks taken together.

        Args:
            keep: How many of a name's indices are kept: 1 tells stages apart, 0 does not.

        Returns:
            One part for each group, in the order of the first of each.
        """
        groups = defaultdict(list)
        for part in self.parts:
            groups[_starred(part.name, keep), part.own].append(part)
        return tuple(_together(name, members) for (name, _), members in groups.items())

    def table(self) -> str:
        """Parts by stage, parts over all stages, and kinds of operations, as text."""
        sections = [
            f'{self.milliseconds:.2f} ms for a batch of {self.input_shape[0]} ({self.unobserved:.2f} ms unobserved), '
            f'median of {self.rounds} passes, {self.dtype} on {self.device}.\n'
            f'This machine just then: {self.rate / 1e9:.1f} GMAC/s in a large matrix product, '
            f'{self.bandwidth / 1e9:.1f} GB/s in a large copy.',
            self._parts_as_text('part, by stage', self.grouped(1)),
            self._parts_as_text('part, over all stages', self.grouped(0)),
            self._kinds_as_text(),
        ]
        return '\n\n'.join(sections)

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        values = asdict(self)
        return values | {name: list(values[name]) for name in ('input_shape', 'parts', 'mixers')}

    def _parts_as_text(self, title: str, parts: tuple[Part, ...]) -> str:
        total = sum(part.milliseconds for part in parts)
        rows: list[tuple[str, ...]] = [(title, 'ms', 'share', 'MMAC', 'MB', 'floor ms', '× floor', 'bound by')]
        for part in parts:
            row = [
                part.label,
                f'{part.milliseconds:.3f}',
                f'{part.milliseconds / total:.1%}',
                f'{part.flops / 1e6:.1f}',
            ]
            if part.bytes is None or part.floor is None:
                row += [''] * 4
            else:
                times = f'{part.milliseconds / part.floor:.1f}' if part.floor else ''
                row += [f'{part.bytes / 1e6:.2f}', f'{part.floor:.3f}', times, part.bound or '']
            rows.append(tuple(row))
        floors = sum(part.floor or 0 for part in parts)
        moved, flops = sum(part.bytes or 0 for part in parts), sum(part.flops for part in parts)
        times = f'{total / floors:.1f}' if floors else ''
        sums = f'{total:.3f}', '100.0%', f'{flops / 1e6:.1f}', f'{moved / 1e6:.2f}', f'{floors:.3f}', times, ''
        return _aligned([*rows, ('sum', *sums)])

    def _kinds_as_text(self) -> str:
        columns = {'ms': self.kinds}
        if self.mixers:
            columns['in mixers ms'] = self.mixer_kinds
        rows = [('kind of operation', *(text for title in columns for text in (title, 'share')))]
        for kind in self.kinds:
            row = [kind]
            for times in columns.values():
                row += [f'{times.get(kind, 0):.3f}', f'{times.get(kind, 0) / (sum(times.values()) or 1):.1%}']
            rows.append(tuple(row))
        text = _aligned(rows)
        if self.unknown:
            names = sorted(self.unknown, key=self.unknown.__getitem__, reverse=True)
            text += f'\n\nUnder {OTHER!r}: {", ".join(names)}.'
        return text


def break_down(model: nn.Module, x: Tensor, rounds: int = 10) -> Breakdown:
    """Measure where the time of an eager forward pass goes.

    A part is a module with a name of its own, such as a block's ``mixer``; lists, their entries (stages, blocks) and
    modules that hold lists within lists are opened up, down to their parts. What an opened module does between its
    parts is a part too.

    Args:
        model: Any module in eval mode that takes one tensor, on the device of ``x``. To see within a part, hand in that
            part and its input.
        x: Its input. Under autocast, or in another memory format, all is measured under these.
        rounds: Passes that count, after a few that do not.

    Raises:
        ValueError: If the model is in training mode, if there are no rounds, or if the model returns no tensor.

    Example:
        >>> import torch
        >>> from mmevm.analysis.latency.breakdown import break_down
        >>> from mmevm.models import EfficientViM
        >>> breakdown = break_down(EfficientViM('m1').eval(), torch.rand(1, 3, 64, 64), rounds=2)
        >>> [part.name for part in breakdown.grouped()][:5]
        ['', 'patch_embed', 'stages.0', 'stages.0.blocks.*', 'stages.0.blocks.*.dwconv1']
    """
    if model.training:
        raise ValueError(f'{type(model).__name__} is in training mode: call its eval() before its time is broken down.')
    if rounds < 1:
        raise ValueError(f'rounds={rounds}: at least 1.')
    modules = _parts(model)
    with torch.no_grad():
        rate, bandwidth, dtype = _measure_rates(x)
        with torch.autocast(x.device.type, enabled=False):  # its casts cost no multiply-accumulates
            # Of a copy: the counter leaves its hooks behind where a model raises.
            complexity = measure_complexity(deepcopy(model), x.to(next(model.parameters(), x)))
        unobserved, times, moved = _time_parts(model, x, modules, rounds)
        mixers = _outermost(name for name in modules if name.rpartition('.')[2] in MIXERS and name in times)
        kinds, mixer_kinds, unknown = _time_kinds(model, x, mixers, rounds)
    flops = _own_flops({name: complexity.by_module[name][1] for name in modules})

    parts = []
    for name in times:
        module, opened = modules[name]
        own = opened and any(other != name and _is_within(other, name) for other in times)
        milliseconds = median(times[name]) / 1e6
        size: int | None = None
        floor: float | None = None
        bound: str | None = None
        if not own:
            size = moved[name] + _weight_bytes(module)
            floors = dict(arithmetic=flops[name] / rate * 1e3, memory=size / bandwidth * 1e3)
            bound = max(floors, key=floors.__getitem__)
            floor = floors[bound]
        parts.append(Part(name, type(module).__name__, own, milliseconds, flops[name], size, floor, bound))
    return Breakdown(
        device=_device_name(x.device),
        dtype=str(dtype).removeprefix('torch.'),
        input_shape=tuple(x.shape),
        rounds=rounds,
        rate=rate,
        bandwidth=bandwidth,
        milliseconds=sum(part.milliseconds for part in parts),
        unobserved=unobserved * 1e3,
        parts=tuple(parts),
        mixers=mixers,
        kinds=kinds,
        mixer_kinds=mixer_kinds,
        unknown=unknown,
    )


def _parts(model: nn.Module) -> dict[str, tuple[nn.Module, bool]]:
    """Modules that get a clock, owners before what is within, and whether they are opened up."""
    parts: dict[str, tuple[nn.Module, bool]] = {}
    closed: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, IDLE) or any(_is_within(name, other) for other in closed):
            continue
        opened = not name or isinstance(module, CONTAINERS) or _is_entry(name.rpartition('.')[2])
        opened = opened or any(sum(map(_is_entry, inner.split('.'))) > 1 for inner, _ in module.named_modules())
        parts[name] = module, opened
        if not opened:
            closed.append(name)
    return parts


def _is_entry(name: str) -> bool:
    """Whether it is the last part of the name of a list's entry; timm's feature extractors flatten 'stages.0'."""
    return re.fullmatch(r'(.*_)?\d+', name) is not None


def _is_within(name: str, owner: str) -> bool:
    return not owner or name == owner or name.startswith(f'{owner}.')


def _outermost(names: Iterator[str]) -> tuple[str, ...]:
    kept: list[str] = []
    for name in names:
        if not any(_is_within(name, other) for other in kept):
            kept.append(name)
    return tuple(kept)


def _own_flops(flops: Mapping[str, int]) -> dict[str, int]:
    """What each module multiplies outside the others that are within it."""
    own = dict(flops)
    for name in flops:
        owners = [other for other in flops if other != name and _is_within(name, other)]
        if owners:
            own[max(owners, key=len)] -= flops[name]
    return own


class _Clock:
    """Times modules by hooks: what each takes less what those take that it calls."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: dict[str, list[int]] = {}  # nanoseconds of each round by name, in the order of the first calls
        self.moved: dict[str, int] = {}  # bytes into and out of each module in the last round
        self.running: list[list[int]] = []  # [start, nanoseconds of what it has called] of each that is running

    def start_round(self) -> None:
        self.moved.clear()
        for times in self.times.values():
            times.append(0)

    def before(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.times.setdefault(name, [0])
        self.moved[name] = self.moved.get(name, 0) + _bytes((args, kwargs))
        synchronise(self.device)
        self.running.append([perf_counter_ns(), 0])

    def after(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        synchronise(self.device)
        start, called = self.running.pop()
        elapsed = perf_counter_ns() - start
        self.times[name][-1] += elapsed - called
        if self.running:
            self.running[-1][1] += elapsed
        self.moved[name] += _bytes(output)


def _time_parts(
    model: nn.Module, x: Tensor, modules: Mapping[str, tuple[nn.Module, bool]], rounds: int
) -> tuple[float, dict[str, list[int]], dict[str, int]]:
    """Seconds of a pass without clocks; of each module nanoseconds in each round, and bytes into and out of it."""
    clock = _Clock(x.device)
    unobserved: list[float] = []
    for i in range(WARM_UP + rounds):  # in turn, so that both see the machine in the same states
        if i == WARM_UP:
            unobserved.clear()
            for times in clock.times.values():
                times.clear()
        unobserved.append(time_call(partial(model, x), x.device))
        clock.start_round()
        with ExitStack() as hooks:
            for name, (module, _) in modules.items():
                before, after = partial(clock.before, name), partial(clock.after, name)
                hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(after, with_kwargs=True))
            model(x)
    return median(unobserved), clock.times, clock.moved


def _time_kinds(
    model: nn.Module, x: Tensor, mixers: tuple[str, ...], rounds: int
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Milliseconds of each kind of operation in all, in token mixers, and of each operator of unknown kind."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if x.is_cuda else [])]
    with _ranges(model, mixers), profile(activities=activities) as profiler:
        for _ in range(WARM_UP + rounds):
            with record_function(_ROUND):
                model(x)
                synchronise(x.device)

    passes: dict[float, dict[Operation, float]] = {}  # microseconds, by the start of the round
    for event in profiler.events():
        if event.device_type != DeviceType.CPU or event.is_async:
            continue
        owners = list(_owners(event))
        (start,) = [owner.time_range.start for owner in owners if owner.name == _ROUND] or [None]
        if start is None:
            continue
        spent = _device_time(event) if x.is_cuda else event.self_cpu_time_total
        in_mixer = any(owner.name == _MIXER for owner in owners)
        kind = BETWEEN if event.name in (_ROUND, _MIXER) else _kind(event.name)
        if spent > 0:
            passes.setdefault(start, defaultdict(float))[kind, event.name if kind == OTHER else None, in_mixer] += spent
    counted = [passes[start] for start in sorted(passes)[WARM_UP:]]
    all_keys = list(dict.fromkeys(key for times in counted for key in times))

    def medians(key_of: Callable[[str, str | None, bool], str | None]) -> dict[str, float]:
        groups = defaultdict(list)
        for key in all_keys:
            if (name := key_of(*key)) is not None:
                groups[name].append(key)
        return {
            name: median(sum(times.get(key, 0) for key in keys) for times in counted) / 1e3
            for name, keys in groups.items()
        }

    order = [*KINDS, BETWEEN, OTHER]
    kinds = medians(lambda kind, operator, in_mixer: kind)
    mixer_kinds = medians(lambda kind, operator, in_mixer: kind if in_mixer else None)
    return (
        {kind: kinds[kind] for kind in order if kind in kinds},
        {kind: mixer_kinds[kind] for kind in order if kind in mixer_kinds},
        medians(lambda kind, operator, in_mixer: operator),
    )


@contextmanager
def _ranges(model: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Mark in a profile what these modules do."""
    running = []

    def enter(module: nn.Module, args: tuple) -> None:
        running.append(record_function(_MIXER))
        running[-1].__enter__()

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        running.pop().__exit__(None, None, None)

    with ExitStack() as hooks:
        for name in names:
            module = model.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(enter))
            hooks.enter_context(module.register_forward_hook(leave, always_call=True))
        yield


def _owners(event: Any) -> Iterator[Any]:
    """A profiler's event and all in which it happened."""
    while event is not None:
        yield event
        event = event.cpu_parent


def _device_time(event: Any) -> float:
    older = 'self_cuda_time_total'  # torch < 2.4
    return event.self_device_time_total if hasattr(event, 'self_device_time_total') else getattr(event, older)


def _kind(name: str) -> str:
    """Kind of an operator that the profiler calls so, such as 'aten::addmm'."""
    namespace, _, operator = name.rpartition('::')
    if known := _KIND_OF.get(operator.strip('_')):
        return known
    declared = class_of_operator(operator) if namespace == 'aten' else None
    return {POINTWISE: ELEMENTWISE, VIEW: LAYOUT, None: OTHER}[declared]


def _measure_rates(x: Tensor) -> tuple[float, float, torch.dtype]:
    """Multiply-accumulates and bytes a second, and the dtype of matrix products, which autocast may set."""
    largest, size = (8192, 2**29) if x.is_cuda else (1024, 2**27)
    small = x.new_ones(1, 1)
    dtype = (small @ small).dtype
    side, seconds = 128, 0.0
    while side < largest and seconds < 0.01:  # a CPU without instructions for this dtype takes seconds otherwise
        side *= 2
        factor = torch.rand(side, side, device=x.device).to(dtype)
        product = torch.empty_like(factor)
        seconds = _median_seconds(partial(torch.mm, factor, factor, out=product), x.device)
    source = torch.ones(size, dtype=torch.uint8, device=x.device)
    target = torch.empty_like(source)
    return side**3 / seconds, 2 * size / _median_seconds(partial(target.copy_, source), x.device), dtype


def _median_seconds(call: Callable[[], Any], device: torch.device) -> float:
    return median([time_call(call, device) for _ in range(6)][1:])


def _device_name(device: torch.device) -> str:
    if is_cuda(device):
        return torch.cuda.get_device_name(device)
    return f'{device.type} with {torch.get_num_threads()} threads'


def _bytes(values: Any) -> int:
    return sum(value.numel() * value.element_size() for value in tree_flatten(values)[0] if isinstance(value, Tensor))


def _weight_bytes(module: nn.Module) -> int:
    return _bytes([*module.parameters(), *module.buffers()])


def _starred(name: str, keep: int) -> str:
    """A name with a '*' for each index after the first few."""
    words, kept = [], 0
    for word in name.split('.'):
        if _is_entry(word):
            kept += 1
            word = word if kept <= keep else re.sub(r'\d+$', '*', word)
        words.append(word)
    return '.'.join(words)


def _together(name: str, parts: list[Part]) -> Part:
    first = parts[0]
    kinds = dict.fromkeys(part.kind for part in parts)
    bounds: dict[str | None, float] = defaultdict(float)
    for part in parts:
        bounds[part.bound] += part.floor or 0
    return Part(
        name=name,
        kind=', '.join(kinds),
        own=first.own,
        milliseconds=sum(part.milliseconds for part in parts),
        flops=sum(part.flops for part in parts),
        bytes=None if first.own else sum(part.bytes or 0 for part in parts),
        floor=None if first.own else sum(part.floor or 0 for part in parts),
        bound=max(bounds, key=bounds.__getitem__),
    )


def _aligned(rows: list[tuple[str, ...]]) -> str:
    """Rows as columns, the first flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append('  '.join(cells).rstrip())
    return '\n'.join([lines[0], '-' * max(map(len, lines)), *lines[1:]])
