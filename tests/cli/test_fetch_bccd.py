"""tools/fetch_bccd.py: it accepts the files of BCCD only, in whatever archive they come."""

import http.server
import socket
import threading
import zipfile

import pytest
from bccd import BCCD, needs_bccd
from command_line import ROOT, run, run_here

TOOL = ROOT / 'tools/fetch_bccd.py'


@pytest.fixture
def server(tmp_path):
    """The address of an archive, and the path of its file."""
    folder = tmp_path / 'served'
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{httpd.server_port}/a.zip', folder / 'a.zip'
        httpd.shutdown()


def write_archive(path, change=None):
    """Write an archive as GitHub does, with the dataset in a folder and with files that do not belong to it."""
    names = ['LICENSE', *(f'{name}/' for name in ('Annotations', 'ImageSets', 'JPEGImages'))]
    files = sorted(file for file in BCCD.rglob('*') if file.is_file())
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('BCCD_Dataset-d272fb1/', '')
        archive.writestr('BCCD_Dataset-d272fb1/README.md', 'any')
        archive.writestr('BCCD_Dataset-d272fb1/scripts/split.py', 'any')
        for file in files:
            name = file.relative_to(BCCD).as_posix()
            if name.startswith(tuple(names)):
                prefix = '' if name == 'LICENSE' else 'BCCD/'
                content = b'changed' if name == change else file.read_bytes()
                archive.writestr(f'BCCD_Dataset-d272fb1/{prefix}{name}', content)


@needs_bccd
def test_fetch(server, monkeypatch, tmp_path, capsys):
    url, archive = server
    write_archive(archive)
    root = tmp_path / 'data/bccd'
    run_here(monkeypatch, TOOL, root, '--url', url)
    archive.unlink()
    run_here(monkeypatch, TOOL, root, '--url', url)  # nothing is downloaded
    assert capsys.readouterr().out == f'{root}: 364 photographs\n' * 2
    assert [path.name for path in root.parent.iterdir()] == ['bccd']
    for file in ('Annotations/BloodImage_00000.xml', 'ImageSets/Main/test.txt', 'JPEGImages/BloodImage_00000.jpg'):
        assert (root / file).read_bytes() == (BCCD / file).read_bytes()


@needs_bccd
def test_changed_file_is_refused(server, monkeypatch, tmp_path):
    url, archive = server
    write_archive(archive, change='Annotations/BloodImage_00000.xml')
    with pytest.raises(SystemExit, match=r'does not contain the files of commit d272fb1 \(wrong checksum\)'):
        run_here(monkeypatch, TOOL, tmp_path / 'data/bccd', '--url', url)
    assert list((tmp_path / 'data').iterdir()) == []


def test_other_content_is_refused(server, monkeypatch, tmp_path):
    url, archive = server
    archive.write_text('<html>log in first</html>')
    with pytest.raises(SystemExit, match='wrong checksum'):
        run_here(monkeypatch, TOOL, tmp_path / 'data/bccd', '--url', url)


def test_offline(monkeypatch, tmp_path):
    with socket.socket() as silent:
        silent.bind(('127.0.0.1', 0))
        url = f'http://127.0.0.1:{silent.getsockname()[1]}/a.zip'
        with pytest.raises(SystemExit, match=f'^{url}: download failed .* run `make demo-photos DATA=DIR` with'):
            run_here(monkeypatch, TOOL, tmp_path / 'bccd', '--url', url)


def test_demo_with_a_wrong_folder(tmp_path):
    result = run(ROOT / 'tools/demo.py', 'photos', '--data', tmp_path, cwd=ROOT)
    assert result.returncode == 2
    assert f'--data {tmp_path}: expected a folder that contains Annotations, ImageSets and' in result.stderr


def test_folder_without_photographs_is_refused(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match='exists, but has no Annotations'):
        run_here(monkeypatch, TOOL, tmp_path)
