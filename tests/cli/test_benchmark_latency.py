"""tools/benchmark_latency.py as a user starts it, and as a function where that is enough."""

import json

import pytest
import torch
from command_line import ROOT, run, run_here, succeed

from mmevm.analysis.latency import read_json

TOOL = ROOT / 'tools' / 'benchmark_latency.py'
SMALL = ['--resolution', '32', '--batch-size', '1', '--rounds', '2', '--device', 'cpu']


@pytest.fixture
def tool(monkeypatch, capsys):
    """The tool in this process: what it prints, or what it ends with."""

    def call(*arguments):
        run_here(monkeypatch, TOOL, *arguments)
        return capsys.readouterr().out

    return call


def first_cells(printed):
    lines = [line.split('|') for line in printed.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in line[1:-1]] for line in lines if '---' not in line[1]]


@pytest.mark.slow
def test_a_run_from_any_folder_prints_a_table_and_writes_all_times(tmp_path):
    file = tmp_path / 'new' / 'times.json'
    printed = succeed(
        *(TOOL, '--models', 'm1', 'shvit_s1', '--resolution', '64', '--batch-size', '1', '--rounds', '2'),
        *('--reference', 'shvit_s1', '--threads', '1', '--json', file),
        cwd=tmp_path,
    )
    header, ours, peer = first_cells(printed)
    results, parts = read_json(file)
    assert [result.model for result in results] == [ours[0], peer[0]] == ['m1', 'shvit_s1']
    for cells, result in zip((ours, peer), results, strict=True):
        assert len(result.seconds) == 2
        shown = dict(zip(header, cells, strict=True))
        assert float(shown['ms/image']) == pytest.approx(result.milliseconds, abs=0.006)
        assert float(shown['relative']) == pytest.approx(result.milliseconds / results[1].milliseconds, abs=0.006)
        assert result.peak_memory is None or result.peak_memory > 4 * result.params
    assert parts['arguments']['models'] == ['m1', 'shvit_s1']
    assert parts['environment']['versions']['torch'] == torch.__version__
    assert parts['environment']['threads'] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ['new']


def test_a_peer_that_fails_is_a_row_and_the_others_are_measured(tool, tmp_path):
    file = tmp_path / 'times.json'
    printed = tool('--models', 'm1', 'vit_tiny_patch16_224', *SMALL, '--no-memory', '--json', file)
    _, ours, peer = first_cells(printed)
    assert ours[5] == '1.00'  # the first is the reference
    assert set(peer[2:6]) == {'–'}
    assert "vit_tiny_patch16_224, eager: not measured: AssertionError: Input height (32) doesn't match" in printed
    broken = json.loads(file.read_text())['results'][1]
    assert broken['error'].startswith('AssertionError')


def test_timm_s_m4_is_the_reference_where_it_is_measured(tool):
    printed = tool('--models', 'm1', 'efficientvim_m4', *SMALL, '--no-memory')
    assert 'divided by that of efficientvim_m4' in printed


def test_training_is_of_undeployed_models(tool, tmp_path):
    file = tmp_path / 'times.json'
    printed = tool('--models', 'm1', 'shvit_s1', *SMALL, '--train', '--with-cp', '--no-memory', '--json', file)
    assert 'forward+backward' in printed
    ours, peer = json.loads(file.read_text())['results']
    assert (ours['training'], ours['deployed'], ours['with_cp']) == (True, False, True)
    assert (peer['training'], peer['deployed'], peer['with_cp']) == (True, False, False)


def test_forms_and_layouts_can_be_left_as_they_are(tool, tmp_path):
    file = tmp_path / 'times.json'
    tool('--models', 'm1', *SMALL, '--no-memory', '--no-deploy', '--no-channels-last', '--json', file)
    (row,) = json.loads(file.read_text())['results']
    assert (row['deployed'], row['channels_last']) == (False, False)


@pytest.mark.slow
def test_pictures_and_breakdowns(tool, tmp_path):
    file = tmp_path / 'times.json'
    printed = tool(
        *('--models', 'm1', 'shvit_s1', '--resolution', '32', '64', '--batch-size', '1', '2', '--rounds', '2'),
        *('--device', 'cpu', '--no-memory', '--json', file, '--plot', tmp_path / 'pictures', '--breakdown'),
    )
    pictures = sorted((tmp_path / 'pictures').iterdir())
    assert [path.name for path in pictures] == ['batch.png', 'latency.png', 'resolution.png', 'top1.png']
    assert all(path.read_bytes().startswith(b'\x89PNG') for path in pictures)
    breakdown = json.loads(file.read_text())['breakdown']
    assert list(breakdown) == ['m1', 'shvit_s1']
    assert all(found['milliseconds'] > 0 for found in breakdown.values())
    assert 'by stage' in printed
    assert 'box_ap.png is not drawn' in printed  # the paper's detectors have neither


def test_nothing_measured_is_a_failure(tool):
    with pytest.raises(SystemExit) as ended:
        tool('--models', 'vit_tiny_patch16_224', *SMALL, '--no-memory')
    assert ended.value.code == 'Nothing could be measured; the reasons are above.'


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (['--models', 'shvit_s44'], 'close to it are shvit_s4'),
        (['--models', 'nowhere.py'], 'nowhere.py cannot be read'),
        (['--models', 'm1', '--reference', 'm2'], '--reference m2 is none of the models: m1'),
        (['--resolution', '64', '0'], '--resolution takes numbers from 1 on, not [64, 0]'),
        (['--batch-size', '0'], '--batch-size takes numbers from 1 on'),
        (['--rounds', '0'], '--rounds takes numbers from 1 on, not 0'),
        (['--threads', '-1'], '--threads takes numbers from 1 on'),
        (['--with-cp'], 'together with --train'),
        (['--train', '--deploy'], 'cannot be trained'),
        (['--train', '--breakdown'], '--breakdown is of inference'),
    ],
)
def test_arguments_that_cannot_be_meant_end_in_a_sentence(tool, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as ended:
        tool(*arguments)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_a_gpu_that_is_not_there_is_said(tool, capsys):
    with pytest.raises(SystemExit):
        tool('--device', 'cuda')
    assert 'sees no GPU here' in capsys.readouterr().err


def test_help_says_how_long_it_takes():
    result = run(TOOL, '--help', cwd=ROOT)
    assert result.returncode == 0
    assert 'minutes' in result.stdout
