import errno
import os
import stat
import subprocess
import sys
import threading

import pytest
import torch
from command_line import ENVIRONMENT, error_line
from mmengine.fileio import get_file_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner.checkpoint import save_checkpoint

from mmevm.checkpoints import CheckpointError
from mmevm.engine import AtomicBackend

ATOMIC = dict(backend='mmevm.atomic')


def test_mmengine_saves_with_the_atomic_backend(tmp_path):
    state = {'weight': torch.randn(3)}
    save_checkpoint(state, str(tmp_path / 'new' / 'a.pth'), backend_args=ATOMIC)
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['a.pth']
    assert torch.equal(torch.load(tmp_path / 'new/a.pth')['weight'], state['weight'])


def test_readers_see_only_complete_files(tmp_path):
    path, contents = tmp_path / 'a.pth', [bytes([digit]) * 2**22 for digit in range(8)]
    backend = AtomicBackend()
    backend.put(contents[0], path)
    seen = []
    reading = threading.Event()

    def read():
        while not reading.is_set():
            seen.append(path.read_bytes())

    thread = threading.Thread(target=read)
    thread.start()
    for content in contents[1:]:
        backend.put(content, path)
    reading.set()
    thread.join()
    assert seen
    assert all(content in contents for content in seen)


def test_failed_write_keeps_the_previous_file(tmp_path):
    """The process has a limit of 1 MB per file."""
    resource = pytest.importorskip('resource')  # Windows has none
    path = tmp_path / 'a.pth'
    path.write_bytes(b'before')
    code = (
        'from mmevm.cli import run; from mmevm.engine import AtomicBackend;'
        f'run(lambda: AtomicBackend().put(bytes(2**21), {str(path)!r}))'
    )
    result = subprocess.run(
        [sys.executable, '-c', code],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)),
    )
    sentence = error_line(result)
    assert f'{path} cannot be written (File too large)' in sentence
    assert '--resume' in sentence
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b'before']


def test_old_checkpoint_is_removed_after_the_new_one_is_written(tmp_path):
    """mmengine's hook removes the old one first."""
    backend = get_file_backend(backend_args=ATOMIC)
    old, new = tmp_path / 'epoch_1.pth', tmp_path / 'epoch_2.pth'
    backend.put(b'1', old)
    backend.remove(old)
    assert old.exists()
    get_file_backend(backend_args=ATOMIC).put(b'2', new)  # mmengine's hook and runner have a backend each
    assert not old.exists()
    assert new.read_bytes() == b'2'


def test_replaced_checkpoint_of_the_same_name_is_kept(tmp_path):
    backend, path = AtomicBackend(), tmp_path / 'best_acc.pth'
    backend.put(b'1', path)
    backend.remove(path)
    backend.put(b'2', path)
    assert path.read_bytes() == b'2'


def test_failed_write_keeps_the_old_checkpoint(tmp_path):
    backend, old = AtomicBackend(), tmp_path / 'epoch_1.pth'
    backend.put(b'1', old)
    backend.remove(old)
    (tmp_path / 'epoch_2.pth').mkdir()  # a folder is in the way
    with pytest.raises(CheckpointError, match='Earlier checkpoints are unchanged'):
        backend.put(b'2', tmp_path / 'epoch_2.pth')
    assert old.read_bytes() == b'1'
    assert not list(tmp_path.glob('*.part'))


def test_mmengine_hook_accepts_the_atomic_backend(tmp_path):
    hook = CheckpointHook(backend_args=ATOMIC)
    assert isinstance(get_file_backend(str(tmp_path), backend_args=hook.backend_args), AtomicBackend)


# Errors of os.fsync for files or folders


def fail_fsync(monkeypatch, number, *, folders):
    fsync = os.fsync

    def fail(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folders:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, 'fsync', fail)


@pytest.mark.parametrize(
    ('number', 'folders'),
    [
        *((number, folders) for number in (errno.EINVAL, errno.ENOTSUP) for folders in (False, True)),
        *((number, True) for number in (errno.EBADF, errno.EACCES, errno.EPERM)),
    ],
)
def test_file_system_without_sync_is_tolerated(tmp_path, monkeypatch, number, folders):
    fail_fsync(monkeypatch, number, folders=folders)
    AtomicBackend().put(b'1', tmp_path / 'new' / 'epoch_1.pth')
    assert [path.read_bytes() for path in (tmp_path / 'new').iterdir()] == [b'1']


@pytest.mark.skipif(not hasattr(os, 'O_DIRECTORY'), reason='Windows cannot open a folder')
def test_folder_that_cannot_be_opened_is_tolerated(tmp_path, monkeypatch):
    os_open = os.open

    def fail(path, flags, *args, **kwargs):
        if flags & os.O_DIRECTORY:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return os_open(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, 'open', fail)
    AtomicBackend().put(b'1', tmp_path / 'epoch_1.pth')
    assert (tmp_path / 'epoch_1.pth').read_bytes() == b'1'


@pytest.mark.parametrize('folders', [False, True])
@pytest.mark.parametrize('number', [errno.EIO, errno.ENOSPC])
def test_failing_disk_is_an_error(tmp_path, monkeypatch, number, folders):
    fail_fsync(monkeypatch, number, folders=folders)
    with pytest.raises(CheckpointError, match=f'cannot be written .{os.strerror(number)}'):
        AtomicBackend().put(b'1', tmp_path / 'epoch_1.pth')
    assert not list(tmp_path.glob('*.part'))
