"""Download a file over HTTP: with a progress bar, and continued where an earlier download stopped."""

import hashlib
import http.client
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO
from urllib.request import Request, urlopen

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

fcntl = import_module('fcntl') if find_spec('fcntl') else None  # None on Windows
_TIMEOUT = 30  # seconds without any data
_CHUNK = 1 << 16  # bytes


def download(url: str, path: Path) -> None:
    """Download a file, unless it exists.

    The data is written to a file beside ``path``, which is renamed once it is complete. A later call continues an
    interrupted download if the server supports ranges and still has the same version of the file.

    Raises:
        OSError: If the server cannot be reached, refuses, or closes the connection too early.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _download(url, path)
    except http.client.HTTPException as error:  # is not an OSError, as errors of urllib are
        raise OSError(f'the connection failed: {error!r}') from error


def _download(url: str, path: Path) -> None:
    with urlopen(url, timeout=_TIMEOUT) as response:
        version = response.headers.get('ETag') or response.headers.get('Last-Modified')
        size = int(response.headers.get('Content-Length') or 0)  # 0: unknown
        part = path.with_name(f'{path.name}.{hashlib.sha256(str(version).encode()).hexdigest()[:8]}.part')
        with part.open('ab') as file:
            if fcntl is not None:  # of processes that download the same file, the others wait
                fcntl.flock(file, fcntl.LOCK_EX)
            done = file.tell() if version else 0
            if path.exists():
                part.unlink(missing_ok=True)
                return
            if 0 < done < size:
                response.close()
                with urlopen(Request(url, headers={'Range': f'bytes={done}-'}), timeout=_TIMEOUT) as rest:
                    _receive(rest, file, done if rest.status == http.client.PARTIAL_CONTENT else 0, size)
            else:
                _receive(response, file, 0, size)
            part.replace(path)


def _receive(response: http.client.HTTPResponse, file: BinaryIO, done: int, size: int) -> None:
    file.truncate(done)
    columns = TextColumn('{task.description}'), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(response.url, total=size or None, completed=done)
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            done += len(chunk)
            progress.update(task, completed=done)
    file.flush()
    if size and done != size:
        raise OSError(f'the connection was closed after {done} of {size} bytes')
