"""Plots of benchmark results: latency bars, lines over resolution and batch size, and accuracy against speed.

Rows without times are listed below a plot.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from math import exp, log
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, FixedLocator, FuncFormatter, NullLocator

from .results import Result

# Okabe and Ito's color-blind safe colors without yellow, which is too pale for lines.
COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
MARKERS = 'osD^vPX*'

# Box AP of Mask R-CNN on COCO val2017 after 12 epochs (paper, Table B, which lists latencies at 512²).
BOX_AP = {
    'm4': 39.3,
    'efficientvim_m4': 39.3,
    'shvit_s4': 39.0,
    'fastvit_sa12': 38.9,
    'poolformer_s12': 37.3,
    'efficientnet_b0': 31.9,
}

# The settings of a row, for titles and legends.
_SETTINGS: dict[str, Callable[[Result], str]] = {
    'engine': lambda row: row.engine,
    'batch_size': lambda row: f'batch {row.asked_batch_size or row.batch_size}',
    'resolution': lambda row: f'{row.resolution}²',
    'dtype': lambda row: row.dtype,
    'training': lambda row: 'forward and backward' if row.training else 'forward',
    'deployed': lambda row: 'deploy mode' if row.deployed else 'not in deploy mode',
}


def draw_latency(results: Sequence[Result], title: str = '', reference: str | None = None) -> Figure:
    """Draw milliseconds per image as bars, fastest first, with one panel for each setting.

    Args:
        results: Rows to draw.
        title: First line above the plot.
        reference: Model to highlight; None is that of the first row.

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
        times = [_milliseconds(row) for row in panel]
        spreads = [_spread(row) for row in panel]
        colors = [COLORS[1] if row.model == reference else COLORS[0] for row in panel]
        places = range(len(panel))
        axes.barh(places, times, xerr=spreads, color=colors, height=0.7, error_kw=dict(ecolor='#333333', capsize=2))
        for place, time, spread in zip(places, times, spreads, strict=True):
            axes.annotate(f'{time:.3g}', (time + spread, place), (4, 0), textcoords='offset points', va='center')
        axes.set_yticks(places, [row.model for row in panel])
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_xlim(left=0)
        axes.grid(axis='x', alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[['top', 'right']].set_visible(False)
        if setting:
            axes.set_title(setting, loc='left', fontsize=10)
    all_axes[-1].set_xlabel('ms per image (error bars: half the interquartile range)')
    return _add_texts(figure, title, common, notes)


def draw_resolution(results: Sequence[Result], title: str = '') -> Figure:
    """Draw milliseconds per image, and microseconds per pixel, against the resolution (paper, Fig. 5).

    Crossings of lines are marked and listed.

    Args:
        results: Rows of at least two resolutions.
        title: First line above the plot.

    Raises:
        ValueError: If the rows with times do not have two resolutions.
    """
    rows, notes = _timed(results)
    lines, common = _lines(rows, 'resolution', also='batch_size')
    figure = Figure(figsize=(11, 4.8), layout='constrained')
    per_image, per_pixel = figure.subplots(1, 2)
    _draw_lines(per_image, lines, 'resolution', _milliseconds)
    _draw_lines(per_pixel, lines, 'resolution', lambda row: 1e3 * _milliseconds(row) / row.resolution**2)
    per_image.set(xlabel='image side (pixels)', ylabel='ms per image')
    per_pixel.set(xlabel='image side (pixels)', ylabel='µs per pixel')

    points = {name: {row.resolution: _milliseconds(row) for row in line} for name, line in lines.items()}
    crossings = [
        (*place, first, second)
        for first, second in combinations(lines, 2)
        for place in find_crossings(points[first], points[second])
    ]
    for i, (side, time, first, second) in enumerate(sorted(crossings)):
        offset: dict[str, Any] = dict(xytext=(8, -14)) if i % 2 else dict(xytext=(4, 10), ha='right')
        per_image.plot(side, time, 'o', color='black', markersize=12, fillstyle='none', label='_crossing')
        per_image.annotate(f'{side:.0f}²', (side, time), textcoords='offset points', fontsize=9, **offset)
        notes.append(f'{first} and {second} cross at {side:.0f}².')
    figure.legend(*per_image.get_legend_handles_labels(), loc='outside right upper', frameon=False)
    return _add_texts(figure, title, common, notes)


def draw_batch(results: Sequence[Result], title: str = '') -> Figure:
    """Draw milliseconds per image against the batch size.

    Args:
        results: Rows of at least two batch sizes.
        title: First line above the plot.

    Raises:
        ValueError: If the rows with times do not have two batch sizes.
    """
    rows, notes = _timed(results)
    lines, common = _lines(rows, 'batch_size', also='resolution')
    figure = Figure(figsize=(8.5, 4.8), layout='constrained')
    axes = figure.subplots()
    _draw_lines(axes, lines, 'batch_size', _milliseconds)
    axes.set(xlabel='batch size', ylabel='ms per image')
    figure.legend(*axes.get_legend_handles_labels(), loc='outside right upper', frameon=False)
    return _add_texts(figure, title, common, notes)


def draw_pareto(
    results: Sequence[Result],
    title: str = '',
    accuracies: Mapping[str, float] = BOX_AP,
    label: str = 'published box AP with Mask R-CNN',
) -> Figure:
    """Draw a published accuracy against the measured speed, with the Pareto front of each setting.

    Args:
        results: Rows to draw. Models without a published accuracy are listed below the plot.
        title: First line above the plot.
        accuracies: Accuracy by model.
        label: Name of the accuracy.

    Raises:
        ValueError: If no row has both times and an accuracy.
    """
    rows, notes = _timed(results)
    missing = ', '.join(dict.fromkeys(row.model for row in rows if row.model not in accuracies))
    if missing:
        notes.append(f'Not drawn, as no accuracy is listed: {missing}.')
    rows = [row for row in rows if row.model in accuracies]
    if not rows:
        raise ValueError(f'There is nothing to draw: no accuracy is listed for {missing}.')

    common, differing = _settings(rows, _SETTINGS)
    series = defaultdict(list)
    for row in rows:
        series[_describe(row, differing)].append(row)
    figure = Figure(figsize=(8.5, 5.2), layout='constrained')
    axes = figure.subplots()
    for i, (setting, members) in enumerate(series.items()):
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        points = [(1e3 / _milliseconds(row), accuracies[row.model]) for row in members]
        front = pareto_front(points)
        for row, point in zip(members, points, strict=True):
            axes.plot(*point, marker, markersize=8, label='_point', zorder=3, color=color)
            # on the side of the point where the front does not run
            offset, align = ((7, 4), 'left') if point in front else ((-7, -12), 'right')
            axes.annotate(row.model, point, offset, textcoords='offset points', fontsize=9, ha=align)
        axes.plot(*zip(*front, strict=True), color=color, linewidth=1, label=setting)
    axes.set_xscale('log')
    axes.set(xlabel='images per second (measured)', ylabel=label)
    axes.margins(x=0.3, y=0.12)
    low, high = axes.get_ylim()
    padding = max(0, 2 - (high - low)) / 2  # show at least two percentage points
    axes.set_ylim(low - padding, high + padding)
    _format_log_ticks(axes)
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
    if len(series) > 1:
        axes.legend(frameon=False)
    return _add_texts(figure, title, common, notes)


def find_crossings(first: dict[int, float], second: dict[int, float]) -> list[tuple[float, float]]:
    """Return where two lines cross, both straight between their common points on logarithmic axes.

    Args:
        first: Values of one line by position, all positive.
        second: Values of the other line.

    Returns:
        Position and value of each crossing, in ascending order.
    """
    crossings = []
    for left, right in pairwise(sorted(first.keys() & second.keys())):
        gaps = [log(first[x] / second[x]) for x in (left, right)]
        if gaps[0] * gaps[1] < 0:
            share = gaps[0] / (gaps[0] - gaps[1])
            at = [exp(log(a) + share * log(b / a)) for a, b in ((left, right), (first[left], first[right]))]
            crossings.append((at[0], at[1]))
    return crossings


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (speed, accuracy) that no other point dominates, fastest first."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front


def _timed(results: Sequence[Result]) -> tuple[list[Result], list[str]]:
    """Return the rows with times, and notes about the others and about halved batches."""
    rows = [row for row in results if row.seconds and row.error is None]
    others = [row for row in results if row not in rows]
    notes = [f'{row.model} at {row.resolution}², {row.engine}: {row.error or "no times"}' for row in others]
    if not rows:
        raise ValueError(f'There is nothing to draw: no row has times. {" ".join(notes)}'.rstrip())
    halved = [row for row in rows if row.asked_batch_size not in (None, row.batch_size)]
    if halved:
        batches = ', '.join(f'{row.batch_size} for {row.model} at {row.resolution}²' for row in halved)
        notes.append(f'Batch sizes reduced to fit into memory: {batches}.')
    return rows, notes


def _milliseconds(row: Result) -> float:
    """Return the median of a row that has times."""
    assert row.milliseconds is not None
    return row.milliseconds


def _spread(row: Result) -> float:
    return _milliseconds(row) * (row.spread or 0)


def _settings(rows: Sequence[Result], names: Iterable[str]) -> tuple[str, list[str]]:
    """Return a description of the settings that all rows share, and the names of those that differ."""
    differing = [name for name in names if len({_SETTINGS[name](row) for row in rows}) > 1]
    return _describe(rows[0], [name for name in names if name not in differing]), differing


def _describe(row: Result, names: Iterable[str]) -> str:
    return ', '.join(_SETTINGS[name](row) for name in names)


def _lines(rows: Sequence[Result], along: str, also: str) -> tuple[dict[str, list[Result]], str]:
    """Return the rows by line, sorted, and a description of the settings that all share.

    Args:
        rows: Rows with times.
        along: Field of the horizontal axis.
        also: Field that separates lines only if needed, as a batch may be halved along a line.
    """
    if len({getattr(row, along) for row in rows}) < 2:
        raise ValueError(f'There is no line to draw: all rows have the same {along.replace("_", " ")}.')
    names = [name for name in _SETTINGS if name not in (along, also)]
    common, _ = _settings(rows, [*names, also])
    for fields in (names, [*names, also]):
        _, differing = _settings(rows, fields)
        lines = defaultdict(list)
        for row in rows:
            lines[', '.join(filter(None, (row.model, _describe(row, differing))))].append(row)
        if all(len({getattr(row, along) for row in line}) == len(line) for line in lines.values()):
            break
    return {name: sorted(line, key=lambda row: getattr(row, along)) for name, line in lines.items()}, common


def _draw_lines(axes: Axes, lines: dict[str, list[Result]], along: str, value: Callable[[Result], float]) -> None:
    for i, (name, rows) in enumerate(lines.items()):
        values = [value(row) for row in rows]
        axes.errorbar(
            [getattr(row, along) for row in rows],
            values,
            [y * (row.spread or 0) for y, row in zip(values, rows, strict=True)],
            label=name,
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle=('-', '--')[i // len(COLORS) % 2],
            markersize=5,
            capsize=2,
        )
    axes.loglog()
    axes.grid(alpha=0.3, which='both')
    axes.spines[['top', 'right']].set_visible(False)
    _format_log_ticks(axes)
    ticks = sorted({getattr(row, along) for rows in lines.values() for row in rows})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis='x', rotation=45 if len(ticks) > 6 else 0)


def _format_log_ticks(axes: Axes) -> None:
    """Label some ticks of the logarithmic axes with plain numbers instead of powers of ten."""
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        if axis.get_scale() == 'log':
            if high < 4 * low:  # too short for logarithmic ticks
                axis.set_major_locator(AutoLocator())
                axis.set_minor_locator(NullLocator())
            digits = '25' if high > 10 * low else '23457'
            axis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
            axis.set_minor_formatter(
                FuncFormatter(lambda value, _, digits=digits: f'{value:g}' if f'{value:e}'[0] in digits else '')
            )


def _add_texts(figure: Figure, title: str, common: str, notes: Sequence[str]) -> Figure:
    width = int(figure.get_figwidth() * 12)
    figure.suptitle('\n'.join(fill(line, width) for line in (title, common) if line), fontsize=12)
    if notes:
        text = '\n'.join(fill(note, int(width * 1.3)) for note in notes)
        figure.supxlabel(text, x=0.01, ha='left', fontsize=8, color='#333333')
    return figure
