import importlib.util
import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import mmevm
from mmevm.mmcv_ops.stub import StubError, install, status, uninstall

ROOT = Path(mmevm.__file__).parents[1]


@pytest.fixture
def mmcv(tmp_path: Path) -> Path:
    """An mmcv to write to that Python finds before the real one, whose parts it borrows."""
    real = Path(importlib.util.find_spec('mmcv').origin).parent
    folder = tmp_path / 'mmcv'
    folder.mkdir()
    for part in real.iterdir():
        if not part.name.startswith(('_ext', '__pycache__')):
            (folder / part.name).symlink_to(part)
    return folder


def run(mmcv: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        'PYTHONPATH': os.pathsep.join([str(mmcv.parent), str(ROOT)]),
        'PYTHONDONTWRITEBYTECODE': '',  # what Python leaves beside the stub must go, too
    }
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def command(mmcv: Path, name: str) -> subprocess.CompletedProcess:
    return run(mmcv, '-m', 'mmevm.mmcv_ops', name)


def test_mmcv_ops_imports_while_it_is_installed(mmcv: Path) -> None:
    code = 'import mmcv.ops, sys; print(mmcv.ops.nms.__module__, sys.modules["mmcv._ext"].__file__)'
    before = run(mmcv, '-c', code)
    assert before.returncode != 0
    assert "No module named 'mmcv._ext'" in before.stderr

    installed = command(mmcv, 'install')
    assert installed.returncode == 0
    assert str(mmcv / '_ext.py') in installed.stdout
    assert str(mmcv / '_ext.py') in run(mmcv, '-c', code).stdout
    code = """
import torch
from mmcv.ops import nms, nms_rotated
assert len(nms(torch.zeros(2, 4), torch.rand(2), 0.5)[1]) == 2
try:
    nms_rotated(torch.rand(2, 5), torch.rand(2), 0.5)
except NotImplementedError as error:
    print(error)
"""
    assert 'nms_rotated' in run(mmcv, '-c', code).stdout

    assert command(mmcv, 'uninstall').returncode == 0
    assert not list(mmcv.glob('_ext*'))
    assert not list((mmcv / '__pycache__').glob('_ext*'))


@pytest.mark.slow
def test_mmdet_imports_first_while_it_is_installed(mmcv: Path) -> None:
    code = 'from mmdet.apis import DetInferencer; import mmdet.models; print(DetInferencer.__name__)'
    assert "No module named 'mmcv._ext'" in run(mmcv, '-c', code).stderr
    command(mmcv, 'install')
    assert 'DetInferencer' in run(mmcv, '-c', code).stdout


def test_installing_and_removing_twice_is_harmless(mmcv: Path) -> None:
    for name in ('install', 'install', 'uninstall', 'uninstall'):
        result = command(mmcv, name)
        assert result.returncode == 0, result.stderr
    assert 'Nothing to remove' in result.stdout


@pytest.mark.parametrize('name', ['install', 'uninstall'])
def test_other_peoples_files_stay(mmcv: Path, name: str) -> None:
    other = mmcv / '_ext.py'
    other.write_text('# somebody else wrote this')
    result = command(mmcv, name)
    assert result.returncode != 0
    assert str(other) in result.stderr
    assert 'Traceback' not in result.stderr
    assert other.read_text() == '# somebody else wrote this'
    assert 'mmevm did not write it' in command(mmcv, 'status').stdout


def test_compiled_operators_need_nothing(mmcv: Path) -> None:
    compiled = mmcv / f'_ext{EXTENSION_SUFFIXES[0]}'
    compiled.touch()
    assert f'Nothing to install: mmcv has its compiled operators, {compiled}.' in command(mmcv, 'install').stdout
    assert not (mmcv / '_ext.py').exists()
    assert str(compiled) in command(mmcv, 'status').stdout


def test_status_says_what_is_in_use(mmcv: Path) -> None:
    assert 'from the moment that mmevm is imported' in command(mmcv, 'status').stdout
    command(mmcv, 'install')
    assert "_ext.py is mmevm's" in command(mmcv, 'status').stdout


def test_a_stub_without_mmevm_says_how_to_remove_it(mmcv: Path) -> None:
    command(mmcv, 'install')
    result = run(mmcv, '-c', 'import sys; sys.modules["mmevm"] = None; import mmcv.ops')
    assert result.returncode != 0
    assert f'ImportError: {mmcv / "_ext.py"} hands over to mmevm, which is not installed any more.' in result.stderr


def test_no_mmcv_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    for function in (install, uninstall, status):
        with pytest.raises(StubError, match='mmcv is not installed here'):
            function()
