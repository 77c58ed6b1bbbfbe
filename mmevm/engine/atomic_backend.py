"""Checkpoints that are whole or not there."""

import errno
import os
from pathlib import Path
from typing import ClassVar

from mmengine.fileio import LocalBackend, register_backend

from mmevm.errors import CheckpointError


@register_backend('mmevm.atomic', force=True)
class AtomicBackend(LocalBackend):
    """mmengine's backend of local files, but what it writes appears at once and whole, and nothing is lost meanwhile.

    ``CheckpointHook(backend_args=dict(backend='mmevm.atomic'))`` saves with it. A process that dies while it writes
    leaves ``NAME.part``, which the next one to write that name replaces. On file systems that cannot sync a file or a
    folder, this holds for a process that dies, but not for a machine that loses its power.
    """

    # The hook and the runner have an object each.
    _outdated: ClassVar[list[Path]] = []

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file under another name, bring it to the disk, and then give it its name.

        Raises:
            CheckpointError: If it cannot be written. What was there before is there still.
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
            part.unlink(missing_ok=True)
            raise CheckpointError(
                f'{path} cannot be written ({error.strerror}); the checkpoints before it are as they were. Mend that, '
                'and continue with --resume.'
            ) from error
        while self._outdated:
            if (old := self._outdated.pop()) != path:
                old.unlink(missing_ok=True)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Write a text as :meth:`put` does."""
        self.put(obj.encode(encoding), filepath)

    def remove(self, filepath: str | Path) -> None:
        """Remove a file after the next one has been written: ``CheckpointHook`` removes the old checkpoint first."""
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
    if not hasattr(os, 'O_DIRECTORY'):  # Windows, which cannot open one
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:  # a power failure may then undo the renaming, which leaves the previous file
        if error.errno in _LOST:
            raise
