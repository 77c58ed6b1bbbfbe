import json
import shutil
import sys

import pytest
import regenerate_golden
import torch
from regenerate_golden import CASES, FOLDER, TOLERANCE, compute, find_mismatches, read, summarize


@pytest.mark.parametrize('case', CASES)
def test_outputs_equal_the_record(case):
    problems = list(find_mismatches(read(case)['outputs'], compute(case)))
    assert not problems, '; '.join(problems) + ' (python tests/helpers/regenerate_golden.py)'


def test_every_record_has_a_case():
    assert {file.stem for file in FOLDER.glob('*.json')} == set(CASES)


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Copy the record of one case and change one value of one output."""
    file = tmp_path / 'fusion_head.json'
    shutil.copy(FOLDER / file.name, file)
    content = json.loads(file.read_text())
    output = content['outputs']['plain']
    output['values'][3] += 2 * TOLERANCE * output['largest']
    file.write_text(json.dumps(content))
    monkeypatch.setattr(regenerate_golden, 'FOLDER', tmp_path)
    return file


def regenerate(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['regenerate_golden.py', 'fusion_head', *arguments])
    regenerate_golden.main()


def test_nothing_is_written_without_the_option(record, monkeypatch, capsys):
    before = record.read_text()
    with pytest.raises(SystemExit) as stopped:
        regenerate(monkeypatch)
    assert stopped.value.code not in (None, 0)
    assert record.read_text() == before
    out = capsys.readouterr().out
    assert 'fusion_head: 1 of 2 outputs differ' in out
    assert 'plain: value 3' in out
    assert '2.0e-04 of the largest' in out


@pytest.mark.parametrize('arguments', [['--write'], ['--reason', 'None.'], ['--write', '--reason', ' ']])
def test_writing_needs_a_reason(record, monkeypatch, arguments):
    before = record.read_text()
    with pytest.raises(SystemExit) as stopped:
        regenerate(monkeypatch, *arguments)
    assert stopped.value.code == 2
    assert record.read_text() == before


def test_write(record, monkeypatch, capsys):
    regenerate(monkeypatch, '--write', '--reason', 'Another norm.')
    content = json.loads(record.read_text())
    assert content['reason'] == 'Another norm.'
    assert content['made_by']['torch'] == torch.__version__
    assert content['outputs'] == compute('fusion_head')
    regenerate(monkeypatch)
    assert 'fusion_head: as recorded' in capsys.readouterr().out


def test_find_mismatches():
    x = torch.rand(4, 50)
    record = dict(x=summarize(x))
    assert not list(find_mismatches(record, dict(x=summarize(x + 0.5 * TOLERANCE * x.max()))))
    for other in (x + 2 * TOLERANCE * x.max(), x.flip(1), x[:3], x.where(x < x.max(), torch.nan)):
        assert len(list(find_mismatches(record, dict(x=summarize(other))))) == 1
    # Swap values that are not sampled; the sum and the sum of squares stay the same.
    swapped = x.clone()
    swapped[0, [1, 2, 5, 7]], swapped[0, [3, 4, 6, 8]] = x[0, [3, 4, 6, 8]], x[0, [1, 2, 5, 7]]
    assert len(list(find_mismatches(record, dict(x=summarize(swapped))))) == 1
    assert list(find_mismatches(record, {})) == ['x: no longer there']
    assert list(find_mismatches({}, record)) == ['x: not recorded']
