"""Medians and ratios, the table, the JSON file and the description of the machine."""

import subprocess

import pytest
import torch
from command_line import ROOT

from mmevm.analysis.latency import Result, environment, read_json, relative_times, results, table, write_json


def row(model='m4', seconds=(), **kwargs):
    setting = dict(engine='eager', deployed=True, resolution=512, batch_size=4, dtype='float32', channels_last=True)
    return Result(model, seconds=list(seconds), **setting | kwargs)


def cells(text):
    """Return the tables of a text, each as a list of rows by column title."""
    tables = []
    for block in text.split('\n\n'):
        lines = [[cell.strip() for cell in line.strip('|').split('|')] for line in block.splitlines()]
        if len(lines) > 2 and set(''.join(lines[1])) <= set('-:'):
            tables.append([dict(zip(lines[0], line, strict=True)) for line in lines[2:]])
    return tables


def test_median_and_spread_follow_their_formulas():
    seconds = [0.5, 0.1, 0.2, 0.4, 0.3]
    result = row(seconds=seconds)
    assert result.milliseconds == pytest.approx(1000 * 0.3 / 4)
    lower, upper = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert result.spread == pytest.approx((upper - lower).item() / 2 / 0.3)


def test_rows_without_times_have_no_statistics():
    for result in (row(), row(error='ValueError: no')):
        assert (result.milliseconds, result.spread) == (None, None)
    assert row(seconds=[1.0]).spread is None
    assert row(seconds=[1.0]).milliseconds == 250


def test_ratios_compare_the_same_setting_and_engine():
    rows = [
        row('ours', [0.2, 0.3, 0.1]),
        row('ours', [0.5], engine='compile'),
        row('theirs', [0.4, 0.4, 0.8]),
        row('theirs', [0.1], engine='compile'),
        row('theirs', [0.9], resolution=64),
        row('ours', [0.9], dtype='float16'),
        row('broken', error='no'),
    ]
    assert relative_times(rows, 'theirs') == pytest.approx([0.2 / 0.4, 0.5 / 0.1, 1, 1, 1, None, None])
    assert relative_times(rows, 'broken') == [None] * 7


def test_a_halved_batch_is_compared_per_image_with_the_requested_one():
    rows = [
        row('large', [1.6], batch_size=16),
        row('large', [0.8], batch_size=4),
        row('small', [0.4], batch_size=4, asked_batch_size=16),
    ]
    assert relative_times(rows, 'large') == pytest.approx([1, 1, (0.4 / 4) / (1.6 / 16)])


def test_table_shows_all_values_in_their_units():
    ours = row('ours', [0.2, 0.2, 0.4], params=5_713_534, flops=1_132_029_824, peak_memory=123_456_789)
    theirs = row('theirs', [0.5, 0.5, 0.5], notes=['FLOPs without NMSop'])
    broken = row('broken', error='ValueError: no such thing')
    halved = row('halved', [0.5], batch_size=2, asked_batch_size=4)
    text = table([ours, theirs, broken, halved], reference='theirs')
    ((first, second, third, fourth),) = cells(text)
    assert first == {
        'model': 'ours',
        'engine': 'eager',
        'ms/image': '50.00',
        '± %': f'{100 * 0.05 / 0.2:.1f}',
        'images/s': '20.0',
        'relative': '0.40',
        'params (M)': '5.71',
        'MFLOPs': '1,132',
        'memory (MB)': '123',
    }
    assert (second['relative'], second['MFLOPs'], second['± %']) == ('1.00', '–', '0.0')
    assert set(third.values()) == {'broken', 'eager', '–'}
    assert fourth['ms/image'] == '250.00'
    assert 'broken, eager: not measured: ValueError: no such thing' in text.splitlines()
    assert 'theirs, eager: FLOPs without NMSop' in text.splitlines()
    assert 'halved, eager: batch 2, as larger ones did not fit into memory' in text.splitlines()
    assert text.startswith('512×512, batch 4, float32, forward;')
    table_lines = [line for line in text.splitlines() if line.startswith('|')]
    assert len({len(line) for line in table_lines}) == 1


def test_each_setting_has_its_own_table():
    rows = [
        row(seconds=[1.0]),
        row(seconds=[1.0], resolution=1024),
        row(seconds=[1.0], dtype='bfloat16'),
        row(seconds=[1.0], training=True),
        row(seconds=[1.0], engine='compile'),
    ]
    text = table(rows, reference='m4')
    assert [len(found) for found in cells(text)] == [2, 1, 1, 1]
    assert 'forward+backward;' in text


def test_json_round_trip(tmp_path):
    rows = [
        row('ours', [0.1, 0.25], params=3, flops=4, peak_memory=5, training=True, notes=['a note']),
        row('broken', error='ValueError: µ', asked_batch_size=64),
    ]
    file = tmp_path / 'new' / 'folder' / 'times.json'
    write_json(file, rows, arguments=dict(models=['ours']), environment=environment(), breakdown={})
    read, parts = read_json(file)
    assert read == rows
    assert list(parts) == ['arguments', 'environment', 'breakdown']
    assert parts['arguments'] == dict(models=['ours'])


@pytest.mark.parametrize('name', ['latency_512', 'engines', 'resolution', 'batch', 'train', 'breakdown'])
def test_published_results_can_be_read(name):
    rows, parts = read_json(ROOT / 'docs' / 'benchmarks' / f'{name}.json')
    assert all(row.milliseconds > 0 for row in rows)
    assert parts['environment']['versions']['torch']
    assert 'm4' in table(rows, 'm4')


def test_environment_describes_the_machine_and_versions():
    found = environment()
    assert found['versions']['torch'] == torch.__version__
    assert {'mmevm', 'timm', 'numpy'} <= set(found['versions'])
    assert found['threads'] == torch.get_num_threads()
    assert found['cpu']
    assert found['cpu_capability']
    assert found['gpu'] is None


def git(folder, *arguments):
    identity = ['-c', 'user.name=a', '-c', 'user.email=a@example.com', '-c', 'commit.gpgsign=false']
    done = subprocess.run(['git', '-C', folder, *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_git_commit_is_that_of_the_checkout_of_mmevm(tmp_path, monkeypatch):
    package = tmp_path / 'mmevm'
    package.mkdir()
    (package / '__init__.py').touch()
    monkeypatch.setattr(results, '__file__', str(package / 'results.py'))
    monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
    assert results.git_commit() is None  # not in a checkout
    git(tmp_path, 'init')
    (tmp_path / 'other').touch()
    git(tmp_path, 'add', 'other')
    git(tmp_path, 'commit', '-m', 'another project')
    assert results.git_commit() is None  # installed inside another project's checkout
    git(tmp_path, 'add', '.')
    git(tmp_path, 'commit', '-m', 'mmevm')
    git(tmp_path, 'tag', '-a', 'v1', '-m', 'a release')
    commit = git(tmp_path, 'rev-parse', 'HEAD')
    assert results.git_commit() == commit
    (package / '__init__.py').write_text('changed')
    assert results.git_commit() == f'{commit}-dirty'
