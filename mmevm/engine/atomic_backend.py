"""Atomic writes of checkpoints."""

import contextlib
import errno
import os
from pathlib import Path
from typing import ClassVar

from mmengine.fileio import LocalBackend, register_backend

from mmevm.errors import CheckpointError


@register_backend('mmevm.atomic', force=True)
class AtomicBackend(LocalBackend):
    """mmengine backend of local files that writes each file completely or not at all.

    Use it by ``CheckpointHook(backend_args=dict(backend='mmevm.atomic'))``. A process that is killed while it writes
    leaves ``NAME.part``, which the next write of that file replaces. On file systems that cannot sync, this holds if
    the process is killed, but not if the machine loses power.
    """

    # shared: the hook and the runner have a backend each
    _outdated: ClassVar[list[Path]] = []

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write and sync a file under another name, then rename it.

        Raises:
            CheckpointError: If the file cannot be written. A previous file of that name is unchanged.
        """
        path = Path(filepath)
        part = path.with_name(f'{path.name}.part')
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open('wb') as file:
                file.write(obj)
                file.flush()
                _sync(file.fileno())
            part.replace(path)
            _sync_folder(path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink()
            raise CheckpointError(
                f'{path} cannot be written ({error.strerror}). Earlier checkpoints are unchanged. Solve this problem, '
                'then repeat the command; continue a training with --resume.'
            ) from error
        while self._outdated:
            if (old := self._outdated.pop()) != path:
                old.unlink(missing_ok=True)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Write a text file atomically."""
        self.put(obj.encode(encoding), filepath)

    def remove(self, filepath: str | Path) -> None:
        """Remove a file after the next write: ``CheckpointHook`` removes the old checkpoint before it saves one."""
        self._outdated.append(Path(filepath))


# Errors of network and FUSE file systems that cannot sync; a full or failing disk raises others.
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
_LOST = (errno.EIO, errno.ENOSPC, getattr(errno, 'EDQUOT', errno.ENOSPC))


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, 'O_DIRECTORY'):  # Windows cannot open folders
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:  # without sync, a power failure may undo the renaming
        if error.errno in _LOST:
            raise
