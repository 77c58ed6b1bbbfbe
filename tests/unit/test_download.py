"""Downloads are complete, continue where they stopped, and never mix two versions of a file."""

import http.server
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from mmevm.download import download

CONTENT = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def server():
    """A web server of one file. Its attributes change how it answers."""
    state = SimpleNamespace(content=CONTENT, etag='"1"', ranges=True, length=True, stop=None, asked=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked, start = self.headers.get('Range'), 0
            state.asked.append(asked)
            if self.path == '/missing':
                return self.send_error(404)
            if asked and state.ranges:
                start = int(re.fullmatch(r'bytes=(\d+)-', asked)[1])
                self.send_response(206)
            else:
                self.send_response(200)
            if state.etag:
                self.send_header('ETag', state.etag)
            if state.length:
                self.send_header('Content-Length', str(len(state.content) - start))
            self.end_headers()
            self.wfile.write(state.content[start : state.stop])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        state.url = f'http://127.0.0.1:{httpd.server_port}/file'
        yield state
        httpd.shutdown()


def interrupt(server, path, stop=100_000):
    server.stop = stop
    with pytest.raises(OSError, match=f'closed after {stop} of {len(server.content)} bytes'):
        download(server.url, path)
    assert not path.exists()
    server.stop = None
    server.asked.clear()


def test_complete_file(server, tmp_path):
    path = tmp_path / 'new/file'
    download(server.url, path)
    download(server.url, path)  # exists
    assert path.read_bytes() == CONTENT
    assert server.asked == [None]
    assert list(path.parent.iterdir()) == [path]


def test_interrupted_download_continues(server, tmp_path):
    path = tmp_path / 'file'
    interrupt(server, path)
    download(server.url, path)
    assert path.read_bytes() == CONTENT
    assert server.asked == [None, 'bytes=100000-']
    assert list(tmp_path.iterdir()) == [path]


def test_download_restarts_if_the_server_ignores_ranges(server, tmp_path):
    interrupt(server, tmp_path / 'file')
    server.ranges = False
    download(server.url, tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == CONTENT


@pytest.mark.parametrize('etag', ['"2"', None])
def test_download_restarts_if_the_file_may_have_changed(server, tmp_path, etag):
    server.etag = etag and '"1"'
    interrupt(server, tmp_path / 'file')
    server.content, server.etag = CONTENT[::-1], etag
    download(server.url, tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == CONTENT[::-1]
    assert server.asked == [None]


def test_size_is_unknown(server, tmp_path):
    server.length = False  # as for archives that GitHub creates
    download(server.url, tmp_path / 'file')
    assert (tmp_path / 'file').read_bytes() == CONTENT


def test_simultaneous_downloads(server, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(download, [server.url] * 4, [tmp_path / 'file'] * 4))
    assert (tmp_path / 'file').read_bytes() == CONTENT
    assert list(tmp_path.iterdir()) == [tmp_path / 'file']


def test_failures_are_os_errors(server, tmp_path):
    with pytest.raises(OSError, match='404'):
        download(server.url.replace('file', 'missing'), tmp_path / 'file')
    with socket.socket() as silent:
        silent.bind(('127.0.0.1', 0))
        with pytest.raises(OSError, match='refused'):
            download(f'http://127.0.0.1:{silent.getsockname()[1]}', tmp_path / 'file')
    with socket.create_server(('127.0.0.1', 0)) as rude:  # closes without an answer
        threading.Thread(target=lambda: rude.accept()[0].close(), daemon=True).start()
        with pytest.raises(OSError, match=r'closed|reset|Remote'):
            download(f'http://127.0.0.1:{rude.getsockname()[1]}', tmp_path / 'file')
    assert not (tmp_path / 'file').exists()
