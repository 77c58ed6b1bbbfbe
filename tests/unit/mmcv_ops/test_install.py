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
from mmevm.mmcv_ops.install import InstallError, install, status, uninstall

ROOT = Path(mmevm.__file__).parents[1]


@pytest.fixture
def mmcv(tmp_path: Path) -> Path:
    """Create a writable copy of mmcv (symbolic links) that Python finds before the installed one."""
    real = Path(importlib.util.find_spec('mmcv').origin).parent
    folder = tmp_path / 'mmcv'
    folder.mkdir()
    for path in real.iterdir():
        if not path.name.startswith(('_ext', '__pycache__')):
            (folder / path.name).symlink_to(path)
    return folder


def run(mmcv: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        'PYTHONPATH': os.pathsep.join([str(mmcv.parent), str(ROOT)]),
        'PYTHONDONTWRITEBYTECODE': '',  # uninstall must remove the cached bytecode as well
    }
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def command(mmcv: Path, name: str) -> subprocess.CompletedProcess:
    return run(mmcv, '-m', 'mmevm.mmcv_ops', name)


@pytest.mark.slow
def test_mmcv_ops_can_be_imported_after_install(mmcv: Path) -> None:
    before = run(mmcv, '-c', 'import mmcv.ops')
    assert before.returncode != 0
    assert "No module named 'mmcv._ext'" in before.stderr

    installed = command(mmcv, 'install')
    assert installed.returncode == 0
    assert str(mmcv / '_ext.py') in installed.stdout
    code = """
import sys
import torch
from mmcv.ops import nms, nms_rotated
print(sys.modules['mmcv._ext'].__file__)
assert len(nms(torch.zeros(2, 4), torch.rand(2), 0.5)[1]) == 2
try:
    nms_rotated(torch.rand(2, 5), torch.rand(2), 0.5)
except NotImplementedError as error:
    print(error)
"""
    output = run(mmcv, '-c', code).stdout
    assert str(mmcv / '_ext.py') in output
    assert 'nms_rotated' in output

    assert command(mmcv, 'uninstall').returncode == 0
    assert not list(mmcv.glob('_ext*'))
    assert not list((mmcv / '__pycache__').glob('_ext*'))


@pytest.mark.slow
def test_mmdet_can_be_imported_first_after_install(mmcv: Path) -> None:
    code = 'from mmdet.apis import DetInferencer; import mmdet.models; print(DetInferencer.__name__)'
    assert "No module named 'mmcv._ext'" in run(mmcv, '-c', code).stderr
    command(mmcv, 'install')
    assert 'DetInferencer' in run(mmcv, '-c', code).stdout


def test_install_and_uninstall_twice(mmcv: Path) -> None:
    for name in ('install', 'install', 'uninstall', 'uninstall'):
        result = command(mmcv, name)
        assert result.returncode == 0, result.stderr
    assert 'Nothing to remove' in result.stdout


@pytest.mark.parametrize('name', ['install', 'uninstall'])
def test_files_of_others_are_kept(mmcv: Path, name: str) -> None:
    other = mmcv / '_ext.py'
    other.write_text('# not written by mmevm')
    result = command(mmcv, name)
    assert result.returncode != 0
    assert str(other) in result.stderr
    assert 'Traceback' not in result.stderr
    assert other.read_text() == '# not written by mmevm'
    assert 'was not written by mmevm' in command(mmcv, 'status').stdout


def test_install_does_nothing_if_operators_are_compiled(mmcv: Path) -> None:
    compiled = mmcv / f'_ext{EXTENSION_SUFFIXES[0]}'
    compiled.touch()
    assert f'Nothing to install: mmcv has compiled operators ({compiled}).' in command(mmcv, 'install').stdout
    assert not (mmcv / '_ext.py').exists()
    assert str(compiled) in command(mmcv, 'status').stdout


def test_status_before_and_after_install(mmcv: Path) -> None:
    assert 'are used once mmevm is imported' in command(mmcv, 'status').stdout
    command(mmcv, 'install')
    assert '_ext.py was written by mmevm' in command(mmcv, 'status').stdout


def test_ext_file_without_mmevm_raises_import_error(mmcv: Path) -> None:
    command(mmcv, 'install')
    result = run(mmcv, '-c', 'import sys; sys.modules["mmevm"] = None; import mmcv.ops')
    assert result.returncode != 0
    assert f'ImportError: {mmcv / "_ext.py"} imports mmevm, which is no longer installed.' in result.stderr


def test_error_without_mmcv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    for function in (install, uninstall, status):
        with pytest.raises(
            InstallError, match=r"^mmcv is not installed\. Run pip install -e '\.\[onedl\]' in the folder"
        ):
            function()


class TestInThisProcess:
    """Messages and effects of the commands, in this process because it is faster."""

    @pytest.fixture(autouse=True)
    def file(self, mmcv: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.syspath_prepend(mmcv.parent)
        monkeypatch.delitem(sys.modules, 'mmcv')
        return mmcv / '_ext.py'

    def test_messages(self, file: Path) -> None:
        unused = 'The fallback operators are used once mmevm is imported.'
        assert status() == f'mmcv has no compiled operators. {file} does not exist. {unused}'
        for _ in range(2):
            message = f'Installed {file}. mmcv uses the fallback operators of mmevm unless it has compiled ones.'
            assert install() == message
            assert status() == f'mmcv has no compiled operators and uses _ext.py. {file} was written by mmevm.'
        cached = Path(py_compile.compile(str(file)))
        assert uninstall() == f'Removed {file}.'
        assert not file.exists()
        assert not cached.exists()
        assert uninstall() == f'Nothing to remove: {file} does not exist.'

    def test_uninstall_without_cached_bytecode(self, file: Path) -> None:
        install()
        assert uninstall() == f'Removed {file}.'
        assert not file.exists()

    @pytest.mark.parametrize('content', [b'', b'# Written by somebody\n', b'\xff\xfe\n', b'\n# Written by mmevm'])
    def test_files_of_others_raise_error_and_are_kept(self, file: Path, content: bytes) -> None:
        file.write_bytes(content)
        with pytest.raises(InstallError) as installing:
            install()
        message = f'{file} already exists and was not written by mmevm. Move or delete it, then run this command again.'
        assert str(installing.value) == message
        with pytest.raises(InstallError) as removing:
            uninstall()
        message = f'{file} was not written by mmevm. Delete it yourself if you no longer need it.'
        assert str(removing.value) == message
        assert status() == f'mmcv has no compiled operators and uses _ext.py. {file} was not written by mmevm.'
        assert file.read_bytes() == content

    def test_messages_with_compiled_operators(self, file: Path) -> None:
        install()
        compiled = file.with_name(f'_ext{EXTENSION_SUFFIXES[-1]}')
        compiled.touch()
        assert install() == f'Nothing to install: mmcv has compiled operators ({compiled}).'
        preferred = f'mmcv uses its compiled operators ({compiled}).'
        assert status() == f'{preferred} {file} was written by mmevm.'
        uninstall()
        assert status() == f'{preferred} {file} does not exist.'

    def test_os_errors_raise_install_error(self, file: Path) -> None:
        file.symlink_to(file.parent / 'gone' / 'file')
        with pytest.raises(InstallError) as writing:
            install()
        assert str(writing.value) == f'Cannot write {file}: No such file or directory.'
        file.unlink()
        install()
        Path(importlib.util.cache_from_source(str(file))).mkdir(parents=True)
        with pytest.raises(InstallError, match=f'Cannot remove {file}: ') as removing:
            uninstall()
        assert isinstance(removing.value.__cause__, OSError)

    @pytest.mark.parametrize('name', ['status', 'install', 'uninstall'])
    def test_main_prints_message(
        self, file: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        expected = dict(status='does not exist', install='Installed', uninstall='Nothing to remove')[name]
        monkeypatch.setattr(sys, 'argv', ['mmcv_ops', name])
        main()
        out, err = capsys.readouterr()
        assert expected in out
        assert str(file) in out
        assert out.endswith('.\n')
        assert not err

    def test_main_exits_with_error_message(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file.touch()
        monkeypatch.setattr(sys, 'argv', ['mmcv_ops', 'install'])
        with pytest.raises(SystemExit, match='was not written by mmevm'):
            main()

    @pytest.mark.parametrize('arguments', [[], ['reinstall'], ['--help']])
    def test_main_usage_and_help(
        self, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, 'argv', ['mmcv_ops', *arguments])
        monkeypatch.setenv('COLUMNS', '200')
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        help_requested = arguments == ['--help']
        assert ended.value.code == (0 if help_requested else 2)
        assert 'usage: python -m mmevm.mmcv_ops [-h] {install,uninstall,status}' in out + err
        lines = [line.split() for line in out.splitlines()]
        for sentence in (
            'Use the fallback operators of mmevm in programs that import mmcv.ops before mmevm.',
            'install writes mmcv/_ext.py, uninstall removes it, status prints which operators mmcv uses',
        ):
            assert (sentence.split() in lines) == help_requested
