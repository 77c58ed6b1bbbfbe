"""Plots of benchmark results: latency bars, lines over resolution or batch size, and accuracy against speed.

Titles name the settings that all rows share. Rows without times are listed below a plot.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from textwrap import fill
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, FixedLocator, LogLocator, NullLocator

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
    'resolution': lambda row: row.size if row.width else f'{row.resolution}²',
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
    panels = _group(rows, _differing(rows, _SETTINGS))
    figure = Figure(figsize=(8, 1.4 + 0.34 * len(rows) + 0.45 * len(panels)), layout='constrained')
    heights = [len(panel) + 0.6 for panel in panels.values()]
    all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (setting, panel) in zip(all_axes, panels.items(), strict=True):
        panel.sort(key=_milliseconds)
        times = [_milliseconds(row) for row in panel]
        spreads = [time * (row.spread or 0) for time, row in zip(times, panel, strict=True)]
        colors = [COLORS[1] if row.model == reference else COLORS[0] for row in panel]
        axes.barh(range(len(panel)), times, xerr=spreads, color=colors, height=0.7, capsize=2)
        for place, (time, spread) in enumerate(zip(times, spreads, strict=True)):
            axes.annotate(f'{time:.3g}', (time + spread, place), (4, 0), textcoords='offset points', va='center')
        axes.set_yticks(range(len(panel)), [row.model for row in panel])
        axes.invert_yaxis()
        axes.margins(x=0.1)
        axes.set_xlim(left=0)
        axes.set_title(setting, loc='left', fontsize=10)
        _add_grid(axes, 'x')
    all_axes[-1].set_xlabel('ms per image (error bars: half the interquartile range)')
    return _add_texts(figure, title, rows, notes)


def draw_lines(results: Sequence[Result], along: str, title: str = '') -> Figure:
    """Draw milliseconds per image against the resolution, with microseconds per pixel, or against the batch size.

    The plot against the resolution is that of the paper's Fig. 5.

    Args:
        results: Rows to draw.
        along: Horizontal axis, 'resolution' or 'batch_size'.
        title: First line above the plot.

    Raises:
        ValueError: If the rows with times do not have two resolutions or batch sizes.
    """
    rows, notes = _timed(results)
    ticks = sorted({getattr(row, along) for row in rows})
    if len(ticks) < 2:
        raise ValueError(f'There is no line to draw: all rows have the same {along.replace("_", " ")}.')
    # The default batch size depends on the resolution. The other axis separates lines only if it varies by itself.
    other = 'batch_size' if along == 'resolution' else 'resolution'
    separate = len({(row.resolution, row.asked_batch_size or row.batch_size) for row in rows}) > len(ticks)
    names = [name for name in _SETTINGS if name != along and (name != other or separate)]
    lines = _group(rows, ['model', *_differing(rows, names)])

    values: dict[str, Callable[[Result], float]] = {'ms per image': _milliseconds}
    if along == 'resolution':
        values['µs per pixel'] = lambda row: 1e3 * _milliseconds(row) / row.resolution**2
    figure = Figure(figsize=(11 if len(values) > 1 else 8.5, 4.8), layout='constrained')
    all_axes = figure.subplots(1, len(values), squeeze=False)[0]
    for axes, (label, value) in zip(all_axes, values.items(), strict=True):
        for i, (name, line) in enumerate(lines.items()):
            line.sort(key=lambda row: getattr(row, along))
            axes.errorbar(
                [getattr(row, along) for row in line],
                [value(row) for row in line],
                [value(row) * (row.spread or 0) for row in line],
                label=name,
                color=COLORS[i % len(COLORS)],
                marker=MARKERS[i % len(MARKERS)],
                markersize=5,
                capsize=2,
            )
        axes.loglog()
        axes.set(xlabel='image side (pixels)' if along == 'resolution' else 'batch size', ylabel=label)
        _add_grid(axes, 'both')
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.tick_params(axis='x', rotation=45 if len(ticks) > 6 else 0)
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc='outside right upper', frameon=False)
    return _add_texts(figure, title, rows, notes)


def draw_pareto(results: Sequence[Result], title: str = '') -> Figure:
    """Draw the published box AP (``BOX_AP``) against the measured speed, with the Pareto front of each setting.

    Args:
        results: Rows to draw. Models without a published box AP are listed below the plot.
        title: First line above the plot.

    Raises:
        ValueError: If no row has both times and a box AP.
    """
    rows, notes = _timed(results)
    missing = ', '.join(dict.fromkeys(row.model for row in rows if row.model not in BOX_AP))
    if missing:
        notes.append(f'Not drawn, as no box AP is published: {missing}.')
    rows = [row for row in rows if row.model in BOX_AP]
    if not rows:
        raise ValueError(f'There is nothing to draw: no box AP is published for {missing}.')

    series = _group(rows, _differing(rows, _SETTINGS))
    figure = Figure(figsize=(8.5, 5.2), layout='constrained')
    axes = figure.subplots()
    for i, (setting, members) in enumerate(series.items()):
        color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
        points = [(1e3 / _milliseconds(row), BOX_AP[row.model]) for row in members]
        front = pareto_front(points)
        for row, point in zip(members, points, strict=True):
            axes.plot(*point, marker, markersize=8, label='_point', zorder=3, color=color)
            # on the side of the point where the front does not run
            offset, align = ((7, 4), 'left') if point in front else ((-7, -12), 'right')
            axes.annotate(row.model, point, offset, textcoords='offset points', fontsize=9, ha=align)
        axes.plot(*zip(*front, strict=True), color=color, linewidth=1, label=setting)
    axes.set_xscale('log')
    axes.set(xlabel='images per second (measured)', ylabel='published box AP with Mask R-CNN')
    axes.margins(x=0.3, y=0.12)
    _add_grid(axes, 'both')
    if len(series) > 1:
        axes.legend(frameon=False)
    return _add_texts(figure, title, rows, notes)


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
    for row in rows:
        if row.asked_batch_size:
            notes.append(f'Batch size reduced to {row.batch_size} for {row.model} at {row.resolution}².')
    return rows, notes


def _milliseconds(row: Result) -> float:
    """Return the median of a row that has times."""
    assert row.milliseconds is not None
    return row.milliseconds


def _differing(rows: Sequence[Result], names: Iterable[str]) -> list[str]:
    """Return the names of the settings that differ between rows."""
    return [name for name in names if len({_SETTINGS[name](row) for row in rows}) > 1]


def _group(rows: Sequence[Result], names: Sequence[str]) -> dict[str, list[Result]]:
    """Group rows by these settings, or by 'model'; the keys describe them."""
    groups = defaultdict(list)
    for row in rows:
        groups[', '.join(row.model if name == 'model' else _SETTINGS[name](row) for name in names)].append(row)
    return groups


def _add_grid(axes: Axes, axis: Literal['x', 'both']) -> None:
    """Add grid lines, and label logarithmic axes with plain numbers instead of powers of ten."""
    for scaled, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        if scaled.get_scale() == 'log':
            scaled.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 10 * low else AutoLocator())
            scaled.set_minor_locator(NullLocator())
            scaled.set_major_formatter('{x:g}')
    axes.grid(axis=axis, alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)


def _add_texts(figure: Figure, title: str, rows: Sequence[Result], notes: Sequence[str]) -> Figure:
    """Add the title, the settings that all rows share, and the notes."""
    differing = _differing(rows, _SETTINGS)
    common = ', '.join(text(rows[0]) for name, text in _SETTINGS.items() if name not in differing)
    width = int(figure.get_figwidth() * 12)
    figure.suptitle('\n'.join(fill(line, width) for line in (title, common) if line), fontsize=12)
    if notes:
        text = '\n'.join(fill(note, int(width * 1.3)) for note in notes)
        figure.supxlabel(text, x=0.01, ha='left', fontsize=8, color='#333333')
    return figure
