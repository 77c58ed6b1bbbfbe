"""Pictures of what was measured: bars, lines against resolution and batch size, and accuracy against speed.

What has no times is named below a picture.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, pairwise
from math import nan
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, FixedLocator, FuncFormatter, NullLocator

from .results import Result

# Okabe and Ito's colours, which the colour-blind tell apart; yellow, too pale for lines on white, is left out.
COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
MARKERS = 'osD^vPX*'
GREY = '#9A9A9A'

# ImageNet-1K top-1 in percent at the resolutions that it was published for, after 300 epochs (paper, Table 3; 512 and
# 384 after fine-tuning: Table 5). Methods that timm has are under timm's names.
_OURS = {
    'm1': {224: 72.9},
    'm2': {224: 75.4},
    'm3': {224: 77.6},
    'm4': {256: 79.4, 384: 80.9, 512: 81.9},
}
TOP1 = {
    **_OURS,
    **{f'efficientvim_{arch}': figures for arch, figures in _OURS.items()},
    'shvit_s1': {224: 72.8},
    'shvit_s2': {224: 75.2},
    'shvit_s3': {224: 77.4},
    'shvit_s4': {256: 79.4, 384: 81.0, 512: 82.0},
    'convnextv2_atto': {224: 76.2},
    'convnextv2_femto': {224: 78.0},
    'efficientformerv2_s0': {224: 73.7},
    'efficientformerv2_s1': {224: 77.9},
    'efficientvit_m3': {224: 73.4},
    'efficientvit_m4': {224: 74.3},
    'efficientvit_m5': {224: 77.1},
    'fastvit_t8': {256: 75.6},
    'fastvit_t12': {256: 79.1},
    'mobilenetv3_large_075': {224: 73.3},  # 600 epochs
    'mobilenetv3_large_100': {224: 75.2},  # 600 epochs
    'mobileone_s0': {224: 71.4},
    'mobileone_s2': {224: 77.4},
    'mobileone_s3': {224: 78.1},
    'mobileone_s4': {224: 79.4},
    'mobilevitv2_050': {256: 70.2},
    'mobilevitv2_075': {256: 75.6},
    'mobilevitv2_100': {256: 78.1},
    'mobilevitv2_125': {256: 79.6},
}

# Box AP on COCO val2017 after 12 epochs, of detectors on these backbones (paper, Table B), which times them at 512².
_MASK_RCNN = {
    'm4': 39.3,
    'efficientvim_m4': 39.3,
    'shvit_s4': 39.0,
    'fastvit_sa12': 38.9,
    'poolformer_s12': 37.3,
    'efficientnet_b0': 31.9,
}

# What an accuracy is called on an axis, and the figures by model and resolution.
ACCURACIES = {
    'top1': ('published ImageNet-1K top-1 (%)', TOP1),
    'box_ap': ('published box AP with Mask R-CNN', {model: {512: ap} for model, ap in _MASK_RCNN.items()}),
}

# What rows have in common if they are to be compared, in words.
_SETTINGS: dict[str, Callable[[Result], str]] = {
    'engine': lambda row: row.engine,
    'batch_size': lambda row: f'batch {row.asked_batch_size or row.batch_size}',
    'resolution': lambda row: f'{row.resolution}²',
    'dtype': lambda row: row.dtype,
    'training': lambda row: 'forward and backward' if row.training else 'forward',
    'deployed': lambda row: 'form for inference' if row.deployed else 'as trained',
}


def draw_latency(results: Sequence[Result], title: str = '', reference: str | None = None) -> Figure:
    """Draw milliseconds per image as bars, fastest first, with one panel for each setting.

    Args:
        results: Rows; what has no times is named below the bars.
        title: What was measured, and on which device.
        reference: Model whose bars stand out; None is the first row's.

    Raises:
        ValueError: If no row has times.
    """
    rows, notes = _timed(results)
    reference = reference or results[0].model
    common, differing = _settings(rows, _SETTINGS)
    panels = defaultdict(list)
    for row in rows:
        panels[_describe(row, differing)].append(row)

    figure = Figure(figsize=(8, 1.4 + 0.34 * len(rows) + 0.45 * len(panels)), layout='constrained')
    heights = [len(panel) + 0.6 for panel in panels.values()]
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (setting, panel) in zip(all_axes, panels.items(), strict=True):
        panel.sort(key=_milliseconds)
        names = [_name(row) for row in panel]
        times = [_milliseconds(row) for row in panel]
        colours = [COLOURS[1] if row.model == reference else COLOURS[0] for row in panel]
        spreads = [time * (row.spread or 0) for time, row in zip(times, panel, strict=True)]
        places = range(len(panel))  # by number: rows of the same name are rows all the same
        axes.barh(places, times, xerr=spreads, color=colours, height=0.7, error_kw=dict(ecolor='#333333', capsize=2))
        for place, time, spread in zip(places, times, spreads, strict=True):
            axes.annotate(f'{time:.3g}', (time + spread, place), (4, 0), textcoords='offset points', va='center')
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_xlim(left=0)
        axes.grid(axis='x', alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[['top', 'right']].set_visible(False)
        if setting:
            axes.set_title(setting, loc='left', fontsize=10)
    all_axes[-1].set_xlabel('ms per image; whiskers: half the interquartile range')
    return _finished(figure, title, common, notes)


def draw_resolution(results: Sequence[Result], title: str = '') -> Figure:
    """Draw milliseconds per image, and microseconds per pixel, against the resolution (paper, Fig. 5).

    Where two lines cross, by interpolation between logarithms, is marked and said below.

    Args:
        results: Rows of at least two resolutions; what has no times is named below the lines.
        title: What was measured, and on which device.

    Raises:
        ValueError: If rows with times have no two resolutions.
    """
    rows, notes = _timed(results)
    lines, common = _lines(rows, 'resolution', also='batch_size')
    figure = Figure(figsize=(11, 4.8), layout='constrained')
    whole, each = figure.subplots(1, 2)
    _draw_lines(whole, lines, 'resolution', _milliseconds)
    _draw_lines(each, lines, 'resolution', lambda row: 1e3 * _milliseconds(row) / row.resolution**2)
    whole.set(xlabel='pixels of a side', ylabel='ms per image')
    each.set(xlabel='pixels of a side', ylabel='µs per pixel')

    crossings = [
        (*place, first, second)
        for first, second in combinations(lines, 2)
        for place in find_crossings(_points(lines[first]), _points(lines[second]))
    ]
    for i, (side, time, first, second) in enumerate(sorted(crossings)):
        beside: dict[str, Any] = dict(xytext=(8, -14)) if i % 2 else dict(xytext=(4, 10), ha='right')
        whole.plot(side, time, 'o', color='black', markersize=12, fillstyle='none', label='_crossing')
        whole.annotate(f'{side:.0f}²', (side, time), textcoords='offset points', fontsize=9, **beside)
        notes.append(f'{first} and {second} cross at {side:.0f}².')
    figure.legend(*whole.get_legend_handles_labels(), loc='outside right upper', frameon=False)
    return _finished(figure, title, common, notes)


def draw_batch(results: Sequence[Result], title: str = '') -> Figure:
    """Draw milliseconds per image against the batch size.

    Args:
        results: Rows of at least two batch sizes; what has no times is named below the lines.
        title: What was measured, and on which device.

    Raises:
        ValueError: If rows with times have no two batch sizes.
    """
    rows, notes = _timed(results)
    lines, common = _lines(rows, 'batch_size', also='resolution')
    figure = Figure(figsize=(8.5, 4.8), layout='constrained')
    axes = figure.subplots()
    _draw_lines(axes, lines, 'batch_size', _milliseconds)
    axes.set(xlabel='images in a batch', ylabel='ms per image')
    figure.legend(*axes.get_legend_handles_labels(), loc='outside right upper', frameon=False)
    return _finished(figure, title, common, notes)


def draw_pareto(results: Sequence[Result], title: str = '', accuracy: str = 'top1') -> Figure:
    """Draw a published accuracy against the measured speed, and the line of those that nothing beats in both.

    A point is hollow if the accuracy was published for another resolution than was timed: that of the nearest one is
    drawn.

    Args:
        results: Rows; what has no times or no published accuracy is named below the points.
        title: What was measured, and on which device.
        accuracy: 'top1', or 'box_ap'.

    Raises:
        ValueError: If no row has both.
    """
    accuracy_label, published = ACCURACIES[accuracy]
    rows, notes = _timed(results)
    unpublished = dict.fromkeys(row.model for row in rows if row.model not in published)
    if unpublished:
        notes.append(f'The paper has no such accuracy of {", ".join(unpublished)}: not drawn.')
    rows = [row for row in rows if row.model in published]
    if not rows:
        raise ValueError(f'There is nothing to draw: the paper has no {accuracy!r} of {", ".join(unpublished)}.')

    # A model has its accuracy at its own resolution, so resolutions are no settings here.
    common, differing = _settings(rows, [name for name in _SETTINGS if name != 'resolution'])
    several = len({row.resolution for row in rows}) > 1
    common += '' if several else f', {rows[0].resolution}²'
    series = defaultdict(list)
    for row in rows:
        series[_describe(row, differing)].append(row)
    figure = Figure(figsize=(8.5, 5.2), layout='constrained')
    axes = figure.subplots()
    for i, (setting, members) in enumerate(series.items()):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        sides = [_nearest(row.resolution, published[row.model]) for row in members]
        points = [
            (1e3 / _milliseconds(row), published[row.model][side]) for row, side in zip(members, sides, strict=True)
        ]
        front = pareto_front(points)
        for row, side, point in zip(members, sides, points, strict=True):
            filling: dict[str, Any] = dict(
                markerfacecolor=colour if side == row.resolution else 'white', markeredgecolor=colour
            )
            axes.plot(*point, marker, markersize=8, label='_point', zorder=3, **filling)
            # Away from the line: it runs on the side that is better.
            best = point in front
            beside: dict[str, Any] = dict(
                xytext=(7 if best else -7, 4 if best else -12), ha='left' if best else 'right'
            )
            label = f'{_name(row)}, {row.resolution}²' if several else _name(row)
            axes.annotate(label, point, textcoords='offset points', fontsize=9, **beside)
            if side != row.resolution:
                notes.append(f'{_name(row)} was timed at {row.resolution}², its accuracy is of {side}² (hollow).')
        axes.plot(*zip(*front, strict=True), color=colour, linewidth=1, label=setting)
    axes.set_xscale('log')
    axes.set(xlabel='images a second, measured', ylabel=accuracy_label)
    axes.margins(x=0.3, y=0.12)
    low, high = axes.get_ylim()
    missing = max(0, 2 - (high - low))  # a tenth of a percent is not to fill the picture
    axes.set_ylim(low - missing / 2, high + missing / 2)
    _plain_numbers(axes)
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    if len(series) > 1:
        axes.legend(frameon=False)
    return _finished(figure, title, common, list(dict.fromkeys(notes)))


def find_crossings(
    first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]
) -> list[tuple[float, float]]:
    """Where two lines cross that are straight between their points in logarithms.

    Args:
        first: Points (x, y) of one line, both positive.
        second: Of the other.

    Returns:
        (x, y) of each crossing within what both lines span, in ascending order.
    """
    lines = [np.log(np.array(sorted(points), dtype=float)).T for points in (first, second)]
    low, high = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    sides = np.unique(np.concatenate([x for x, _ in lines]))
    sides = sides[(sides >= low) & (sides <= high)]
    heights = [np.interp(sides, x, y) for x, y in lines]
    gaps = heights[0] - heights[1]
    apart = np.flatnonzero(gaps)  # lines that touch in a point cross if they are on other sides before and after
    crossings = []
    for i, j in pairwise(apart):
        if gaps[i] * gaps[j] < 0:
            x = sides[i + 1] if j - i > 1 else sides[i] + (sides[j] - sides[i]) * gaps[i] / (gaps[i] - gaps[j])
            crossings.append((float(np.exp(x)), float(np.exp(np.interp(x, *lines[0])))))
    return crossings


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (speed, accuracy) that no other beats in one without being worse in the other, fastest first."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front


def _timed(results: Sequence[Result]) -> tuple[list[Result], list[str]]:
    """The rows that have times, and sentences about the others."""
    rows = [row for row in results if row.seconds and row.error is None]
    others = [row for row in results if row not in rows]
    notes = [f'{_name(row)} at {row.resolution}², {row.engine}: {row.error or "no times"}' for row in others]
    if not rows:
        raise ValueError(f'There is nothing to draw: no row has times. {" ".join(notes)}'.rstrip())
    halved = [row for row in rows if row.asked_batch_size not in (None, row.batch_size)]
    if halved:
        places = (f'{row.batch_size} of {_name(row)} at {row.resolution}²' for row in halved)
        notes.append(f'Batches are smaller where memory did not suffice: {", ".join(places)}.')
    return rows, notes


def _milliseconds(row: Result) -> float:
    """Of a row of :func:`_timed`."""
    return row.milliseconds or nan


def _nearest(resolution: int, sides: Iterable[int]) -> int:
    return min(sides, key=lambda side: abs(side - resolution))


def _name(row: Result) -> str:
    return f'{row.model} (with_cp)' if row.with_cp else row.model


def _settings(rows: Sequence[Result], names: Iterable[str]) -> tuple[str, list[str]]:
    """What all rows were measured with, in words, and the names of what they differ in."""
    differing = [name for name in names if len({_SETTINGS[name](row) for row in rows}) > 1]
    return _describe(rows[0], [name for name in names if name not in differing]), differing


def _describe(row: Result, names: Iterable[str]) -> str:
    return ', '.join(_SETTINGS[name](row) for name in names)


def _lines(rows: Sequence[Result], along: str, also: str) -> tuple[dict[str, list[Result]], str]:
    """Rows by the line on which they lie, each sorted, and what all were measured with.

    Args:
        rows: Rows with times.
        along: Field of the horizontal axis.
        also: Field that tells lines apart only if it must: a batch is halved where memory ends.
    """
    if len({getattr(row, along) for row in rows}) < 2:
        what = along.replace('_', ' ')
        raise ValueError(f'There is no line to draw: all rows have the same {what}, and a line needs two or more.')
    names = [name for name in _SETTINGS if name not in (along, also)]
    for fields in (names, [*names, also]):
        common, _ = _settings(rows, [*names, also])
        _, differing = _settings(rows, fields)
        lines = defaultdict(list)
        for row in rows:
            lines[', '.join(filter(None, (_name(row), _describe(row, differing))))].append(row)
        if all(len({getattr(row, along) for row in line}) == len(line) for line in lines.values()):
            break
    return {name: sorted(line, key=lambda row: getattr(row, along)) for name, line in lines.items()}, common


def _draw_lines(axes: Axes, lines: dict[str, list[Result]], along: str, value: Callable[[Result], float]) -> None:
    for i, (name, rows) in enumerate(lines.items()):
        sides = [getattr(row, along) for row in rows]
        values = [value(row) for row in rows]
        errors = [y * (row.spread or 0) for y, row in zip(values, rows, strict=True)]
        style: dict[str, Any] = dict(
            color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], markersize=5, capsize=2
        )
        axes.errorbar(sides, values, errors, label=name, linestyle=('-', '--')[i // len(COLOURS) % 2], **style)
    axes.loglog()
    axes.grid(alpha=0.3, which='both')
    axes.spines[['top', 'right']].set_visible(False)
    _plain_numbers(axes)
    ticks = sorted({getattr(row, along) for rows in lines.values() for row in rows})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis='x', rotation=45 if len(ticks) > 6 else 0)


def _plain_numbers(axes: Axes) -> None:
    """Numbers in place of powers of ten, at some of the ticks of a logarithmic axis."""
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        if axis.get_scale() == 'log':
            if high < 4 * low:  # a logarithmic axis of less has hardly a tick
                axis.set_major_locator(AutoLocator())
                axis.set_minor_locator(NullLocator())
            digits = '25' if high > 10 * low else '23457'
            axis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
            axis.set_minor_formatter(
                FuncFormatter(lambda value, _, digits=digits: f'{value:g}' if f'{value:e}'[0] in digits else '')
            )


def _points(rows: Sequence[Result]) -> list[tuple[float, float]]:
    return [(row.resolution, _milliseconds(row)) for row in rows]


def _finished(figure: Figure, title: str, common: str, notes: Sequence[str]) -> Figure:
    width = int(figure.get_figwidth() * 12)
    figure.suptitle('\n'.join(fill(line, width) for line in (title, common) if line), fontsize=12)
    if notes:
        text = '\n'.join(fill(note, int(width * 1.3)) for note in notes)
        figure.supxlabel(text, x=0.01, ha='left', fontsize=8, color='#333333')
    return figure
