"""Data and texts of the plots; crossings and Pareto fronts against formulas."""

import functools
import random

import matplotlib.image
import pytest
import timm
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from mmevm.analysis.latency.plots import (
    BOX_AP,
    draw_latency,
    draw_lines,
    draw_pareto,
    pareto_front,
)
from mmevm.analysis.latency.results import Result
from mmevm.models import EfficientViM


def row(model='m4', milliseconds=10.0, **settings):
    """Return a row with the same time for each call."""
    defaults = dict(engine='eager', deployed=False, resolution=512, batch_size=1, dtype='float32', channels_last=False)
    settings = {**defaults, **settings}
    return Result(model, seconds=[milliseconds * settings['batch_size'] / 1e3] * 3, **settings)


def failed(model='pvt_v2_b0', error='ValueError: no such thing', **settings):
    result = row(model, **settings)
    result.seconds, result.error = [], error
    return result


def words(figure):
    return ' '.join(' '.join(text.get_text() for text in figure.findobj(Text)).split())


def lines(axes):
    """Return the points of each line in the legend."""
    handles, labels = axes.get_legend_handles_labels()
    return {label: handle.lines[0].get_xydata().tolist() for handle, label in zip(handles, labels, strict=True)}


DRAWN = {
    'latency': [row('m4'), row('shvit_s4', 12)],
    'resolution': [row(resolution=side, milliseconds=side / 10) for side in (256, 512)],
    'batch': [row(batch_size=size, milliseconds=10 / size) for size in (1, 2)],
    'pareto': [row('m4'), row('shvit_s4', 12)],
}
DRAW = {
    'latency': draw_latency,
    'resolution': functools.partial(draw_lines, along='resolution'),
    'batch': functools.partial(draw_lines, along='batch_size'),
    'pareto': draw_pareto,
}


@pytest.mark.parametrize('kind', DRAWN)
def test_plots_can_be_saved(kind, tmp_path):
    file = tmp_path / f'{kind}.png'
    DRAW[kind](DRAWN[kind], title='a processor').savefig(file, dpi=120)
    height, width, _ = matplotlib.image.imread(file).shape
    assert width >= 900
    assert height >= 200


@pytest.mark.parametrize('kind', DRAWN)
def test_plots_name_the_settings_and_failed_rows(kind):
    text = words(DRAW[kind]([failed(), *DRAWN[kind]], title='a processor'))
    for expected in ('a processor', 'm4', 'eager', 'float32', 'pvt_v2_b0 at 512²', 'ValueError: no such thing'):
        assert expected in text


@pytest.mark.parametrize('kind', DRAWN)
def test_plots_without_times_are_refused(kind):
    for results in ([], [failed()], [row(error='RuntimeError: failed later')]):
        with pytest.raises(ValueError, match='nothing to draw'):
            DRAW[kind](results)


def test_bars_are_sorted_by_time_and_show_the_spread():
    slow = row('shvit_s4')
    slow.seconds = [0.010, 0.020, 0.030, 0.040, 0.050]
    (axes,) = draw_latency([slow, row('m4', 7.5)]).axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([7.5, 30])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ['m4', 'shvit_s4']
    (bars,) = [container for container in axes.containers if hasattr(container, 'errorbar')]
    _, _, (whiskers,) = bars.errorbar.lines
    low, high = whiskers.get_segments()[1][:, 0]
    assert (low, high) == pytest.approx((20, 40))  # the quartiles


def test_the_reference_is_highlighted():
    results = [row('m4'), row('shvit_s4', 5), row('pvt_v2_b0', 20)]
    for reference, place in ((None, 1), ('pvt_v2_b0', 2)):
        (axes,) = draw_latency(results, reference=reference).axes
        colors = [bar.get_facecolor() for bar in axes.patches]
        others = [color for i, color in enumerate(colors) if i != place]
        assert others[0] == others[1] != colors[place]


def test_each_setting_has_its_own_panel():
    results = [row(engine=engine, batch_size=size) for engine in ('eager', 'compile') for size in (1, 16)]
    figure = draw_latency([*results, row(deployed=True)])
    titles = {axes.get_title(loc='left') for axes in figure.axes}
    others = {f'{engine}, batch {size}, not in deploy mode' for engine in ('eager', 'compile') for size in (1, 16)}
    assert titles == {*others, 'eager, batch 1, deploy mode'}


def test_a_halved_batch_stays_in_the_panel_of_its_setting():
    figure = draw_latency([row(batch_size=64), row('shvit_s4', batch_size=32, asked_batch_size=64)])
    (axes,) = figure.axes
    assert len(axes.patches) == 2
    assert '32 for shvit_s4 at 512²' in words(figure)


def test_resolution_plot_has_a_line_for_each_model_and_engine():
    results = [
        row(model, 3 * side, engine=engine, resolution=side)
        for model in ('m4', 'shvit_s4')
        for engine in ('eager', 'compile')
        for side in (1024, 256)
    ]
    per_image, per_pixel = draw_lines(along='resolution', results=results).axes
    names = {'m4, eager', 'm4, compile', 'shvit_s4, eager', 'shvit_s4, compile'}
    assert set(lines(per_image)) == set(lines(per_pixel)) == names
    for name in names:
        assert lines(per_image)[name] == [pytest.approx((256, 768)), pytest.approx((1024, 3072))]
        assert lines(per_pixel)[name] == [pytest.approx((256, 768e3 / 256**2)), pytest.approx((1024, 3072e3 / 1024**2))]
    assert {axes.get_xscale() for axes in (per_image, per_pixel)} | {
        axes.get_yscale() for axes in (per_image, per_pixel)
    } == {'log'}


def test_a_line_continues_where_the_batch_was_halved():
    results = [row(resolution=side, batch_size=size) for side, size in ((256, 16), (512, 8))]
    assert set(lines(draw_lines(along='resolution', results=results).axes[0])) == {'m4'}
    results += [row(resolution=side, batch_size=1) for side in (256, 512)]
    assert set(lines(draw_lines(along='resolution', results=results).axes[0])) > {'m4, batch 1'}


def test_batch_plot_has_a_line_for_each_model():
    results = [row(model, 8 / size, batch_size=size) for model in ('m4', 'shvit_s4') for size in (4, 1, 2)]
    (axes,) = draw_lines(along='batch_size', results=results).axes
    expected = [pytest.approx((size, 8 / size)) for size in (1, 2, 4)]
    assert lines(axes) == {'m4': expected, 'shvit_s4': expected}
    assert axes.get_xscale() == 'log'


@pytest.mark.parametrize('span', [1.8, 3, 9, 200])
def test_logarithmic_axes_have_at_least_three_numbers(span):
    figure = draw_lines(along='batch_size', results=[row('m4', 75, batch_size=1), row('m4', 75 * span, batch_size=16)])
    FigureCanvasAgg(figure).draw()
    axis = figure.axes[0].yaxis
    low, high = figure.axes[0].get_ylim()
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    numbers = [float(tick.label1.get_text()) for tick in ticks if tick.label1.get_text()]
    assert len([number for number in numbers if low <= number <= high]) >= 3


def test_lines_need_two_points():
    with pytest.raises(ValueError, match='same resolution'):
        draw_lines(along='resolution', results=[row(), row('shvit_s4')])
    with pytest.raises(ValueError, match='same batch size'):
        draw_lines(along='batch_size', results=[row(), row('shvit_s4')])


def test_pareto_points_are_published_accuracy_and_measured_speed():
    figure = draw_pareto([row('m4', 25)])
    (point,) = [line for line in figure.axes[0].lines if line.get_label() == '_point']
    assert point.get_xydata()[0] == pytest.approx((1e3 / 25, 39.3))


def test_models_without_a_published_accuracy_are_listed():
    results = [row('m4'), row('resnet18')]
    assert 'Not drawn, as no box AP is published: resnet18.' in words(draw_pareto(results))
    with pytest.raises(ValueError, match='resnet18'):
        draw_pareto(results[1:])


def test_pareto_line_connects_the_front_of_each_setting():
    results = [row('efficientnet_b0', 4), row('poolformer_s12', 6), row('fastvit_sa12', 5)]
    (axes,) = draw_pareto([*results, row('m4', 7, engine='compile')]).axes
    fronts = {line.get_label(): line.get_xydata().tolist() for line in axes.lines if line.get_label() != '_point'}
    assert fronts == {
        'eager': [pytest.approx((1e3 / 4, 31.9)), pytest.approx((1e3 / 5, 38.9))],
        'compile': [pytest.approx((1e3 / 7, 39.3))],
    }


def test_published_accuracies_are_of_known_models():
    assert set(BOX_AP) <= {*EfficientViM.arch_settings, *timm.list_models()}
    assert BOX_AP['m4'] == BOX_AP['efficientvim_m4']


def test_pareto_front_equals_brute_force():
    random.seed(0)
    points = [(random.randint(1, 30), random.randint(1, 30)) for _ in range(60)]

    def dominates(one, other):
        return one[0] >= other[0] and one[1] >= other[1] and one != other

    expected = {point for point in points if not any(dominates(other, point) for other in points)}
    front = pareto_front(points)
    assert set(front) == expected
    assert len(front) == len(expected)
    assert [speed for speed, _ in front] == sorted((speed for speed, _ in front), reverse=True)
