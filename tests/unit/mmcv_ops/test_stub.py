import importlib.util
import os
import py_compile
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import mmevm
from mmevm.mmcv_ops.__main__ import main
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
        with pytest.raises(
            StubError, match=r"^mmcv is not installed here: in mmevm's folder, pip install -e '\.\[onedl\]'\.$"
        ):
            function()


class TestInThisProcess:
    """What the commands say and do, without the seconds that a Python of their own takes."""

    @pytest.fixture(autouse=True)
    def stub(self, mmcv: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.syspath_prepend(mmcv.parent)
        monkeypatch.delitem(sys.modules, 'mmcv')
        return mmcv / '_ext.py'

    def test_each_command_says_what_it_did(self, stub: Path) -> None:
        without = f'mmcv has no compiled operators. There is no {stub}. '
        assert status() == without + "mmevm's stand in from the moment that mmevm is imported."
        for _ in range(2):
            assert (
                install() == f"Installed {stub}: mmcv's operators are now mmevm's wherever mmcv has no compiled ones."
            )
            assert status() == f"mmcv has no compiled operators. {stub} is mmevm's."
        cached = Path(py_compile.compile(str(stub)))
        assert uninstall() == f'Removed {stub}.'
        assert not stub.exists()
        assert not cached.exists()
        assert uninstall() == f'Nothing to remove: there is no {stub}.'

    def test_a_stub_that_python_never_read_is_removed(self, stub: Path) -> None:
        install()
        assert uninstall() == f'Removed {stub}.'
        assert not stub.exists()

    @pytest.mark.parametrize('content', [b'', b'# Written by somebody\n', b'\xff\xfe\n', b'\n# Written by mmevm'])
    def test_files_of_others_are_named_and_stay(self, stub: Path, content: bytes) -> None:
        stub.write_bytes(content)
        with pytest.raises(StubError) as installing:
            install()
        message = f'{stub} is there already and mmevm did not write it, so it stays as it is. Move it away first.'
        assert str(installing.value) == message
        with pytest.raises(StubError) as removing:
            uninstall()
        assert str(removing.value) == f'{stub} was not written by mmevm, so it stays.'
        assert status() == f'mmcv has no compiled operators. {stub} is there, and mmevm did not write it.'
        assert stub.read_bytes() == content

    def test_compiled_operators_are_named(self, stub: Path) -> None:
        install()
        compiled = stub.with_name(f'_ext{EXTENSION_SUFFIXES[-1]}')
        compiled.touch()
        assert install() == f'Nothing to install: mmcv has its compiled operators, {compiled}.'
        preferred = f'mmcv has its compiled operators, {compiled}, and Python prefers them to anything else.'
        assert status() == f"{preferred} {stub} is mmevm's."
        uninstall()
        assert status() == f'{preferred} There is no {stub}.'

    def test_what_hinders_writing_or_removing_is_a_sentence(self, stub: Path) -> None:
        stub.symlink_to(stub.parent / 'gone' / 'file')
        with pytest.raises(StubError) as writing:
            install()
        assert str(writing.value) == f'{stub} cannot be written: No such file or directory.'
        stub.unlink()
        install()
        Path(importlib.util.cache_from_source(str(stub))).mkdir(parents=True)
        with pytest.raises(StubError, match=f'{stub} cannot be removed: ') as removing:
            uninstall()
        assert isinstance(removing.value.__cause__, OSError)

    @pytest.mark.parametrize('name', ['status', 'install', 'uninstall'])
    def test_by_command_line(
        self, stub: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        expected = dict(status='There is no', install='Installed', uninstall='Nothing to remove')[name]
        monkeypatch.setattr(sys, 'argv', ['mmcv_ops', name])
        main()
        out, err = capsys.readouterr()
        assert expected in out
        assert str(stub) in out
        assert out.endswith('.\n')
        assert not err

    def test_by_command_line_what_hinders_is_the_exit_message(
        self, stub: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stub.touch()
        monkeypatch.setattr(sys, 'argv', ['mmcv_ops', 'install'])
        with pytest.raises(SystemExit, match='mmevm did not write it'):
            main()

    @pytest.mark.parametrize('arguments', [[], ['reinstall'], ['--help']])
    def test_the_command_line_explains_itself(
        self, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, 'argv', ['mmcv_ops', *arguments])
        monkeypatch.setenv('COLUMNS', '200')
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        asked = arguments == ['--help']
        assert ended.value.code == (0 if asked else 2)
        assert 'usage: python -m mmevm.mmcv_ops [-h] {install,uninstall,status}' in out + err
        lines = [line.split() for line in out.splitlines()]
        for sentence in (
            "Let programs that never import mmevm use its stand-in for mmcv's compiled operators.",
            'install writes mmcv/_ext.py, uninstall removes it, status says what is in use',
        ):
            assert (sentence.split() in lines) == asked
