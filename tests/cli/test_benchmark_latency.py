"""tools/benchmark_latency.py, in a process of its own or, faster, in this one."""

import json

import pytest
import torch
from command_line import ROOT, run, run_here, succeed

from mmevm.analysis.latency import read_json

TOOL = ROOT / 'tools' / 'benchmark_latency.py'
SMALL = ['--resolution', '32', '--batch-size', '1', '--rounds', '2', '--device', 'cpu']


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run the tool in this process and return its output."""

    def call(*arguments):
        run_here(monkeypatch, TOOL, *arguments)
        return capsys.readouterr().out

    return call


def first_cells(printed):
    lines = [line.split('|') for line in printed.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in line[1:-1]] for line in lines if '---' not in line[1]]


@pytest.mark.slow
def test_prints_a_table_and_writes_all_times_from_any_folder(tmp_path):
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


def test_a_failing_peer_is_reported_and_the_others_are_measured(tool, tmp_path):
    file = tmp_path / 'times.json'
    printed = tool('--models', 'm1', 'vit_tiny_patch16_224', *SMALL, '--no-memory', '--json', file)
    _, ours, peer = first_cells(printed)
    assert ours[5] == '1.00'  # the first model is the reference
    assert set(peer[2:6]) == {'–'}
    assert "vit_tiny_patch16_224, eager: not measured: AssertionError: Input height (32) doesn't match" in printed
    broken = json.loads(file.read_text())['results'][1]
    assert broken['error'].startswith('AssertionError')


def test_timm_m4_is_the_default_reference(tool):
    printed = tool('--models', 'm1', 'efficientvim_m4', *SMALL, '--no-memory')
    assert 'divided by that of efficientvim_m4' in printed


def test_training_does_not_use_deploy_mode(tool, tmp_path):
    file = tmp_path / 'times.json'
    printed = tool('--models', 'm1', 'shvit_s1', *SMALL, '--train', '--no-memory', '--json', file)
    assert 'forward+backward' in printed
    ours, peer = json.loads(file.read_text())['results']
    assert [(row['training'], row['deployed']) for row in (ours, peer)] == [(True, False)] * 2


def test_deploy_mode_and_channels_last_can_be_disabled(tool, tmp_path):
    file = tmp_path / 'times.json'
    tool('--models', 'm1', *SMALL, '--no-memory', '--no-deploy', '--no-channels-last', '--json', file)
    (row,) = json.loads(file.read_text())['results']
    assert (row['deployed'], row['channels_last']) == (False, False)


@pytest.mark.slow
def test_writes_plots_and_breakdowns(tool, tmp_path):
    file = tmp_path / 'times.json'
    printed = tool(
        *('--models', 'm1', 'shvit_s1', '--resolution', '32', '64', '--batch-size', '1', '2', '--rounds', '2'),
        *('--device', 'cpu', '--no-memory', '--json', file, '--plot', tmp_path / 'plots', '--breakdown'),
    )
    files = sorted((tmp_path / 'plots').iterdir())
    assert [path.name for path in files] == ['batch.png', 'latency.png', 'resolution.png']
    assert all(path.read_bytes().startswith(b'\x89PNG') for path in files)
    breakdown = json.loads(file.read_text())['breakdown']
    assert list(breakdown) == ['m1', 'shvit_s1']
    assert all(found['milliseconds'] > 0 for found in breakdown.values())
    assert '| stages.*.blocks.*.mixer ' in printed
    assert 'box_ap.png not drawn' in printed  # the paper has no detectors with these backbones


def test_fails_if_no_model_could_be_measured(tool):
    with pytest.raises(SystemExit) as ended:
        tool('--models', 'vit_tiny_patch16_224', *SMALL, '--no-memory')
    assert ended.value.code == 'No model could be measured; the reasons are listed above.'


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--models', 'shvit_s44'], 'similar names: shvit_s4'),
        (['--models', 'nowhere.py'], 'nowhere.py cannot be read'),
        (['--models', 'm1', '--reference', 'm2'], '--reference m2 is not one of --models: m1'),
        (['--resolution', '64', '0'], 'argument --resolution: 0 is less than 1'),
        (['--batch-size', '0'], 'argument --batch-size: 0 is less than 1'),
        (['--rounds', '0'], 'argument --rounds: 0 is less than 1'),
        (['--threads', '-1'], 'argument --threads: -1 is less than 1'),
        (['--train', '--breakdown'], '--breakdown supports inference only'),
    ],
)
def test_invalid_arguments_are_refused(tool, capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        tool(*arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without a GPU')
def test_a_missing_gpu_is_reported(tool, capsys):
    with pytest.raises(SystemExit):
        tool('--device', 'cuda')
    assert 'finds no GPU' in capsys.readouterr().err


def test_help_states_the_duration():
    result = run(TOOL, '--help', cwd=ROOT)
    assert result.returncode == 0
    assert 'minutes' in result.stdout
