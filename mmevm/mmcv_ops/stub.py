"""A file ``mmcv/_ext.py`` that hands over to mmevm, for programs that import ``mmcv.ops`` before they import mmevm."""

import importlib.util
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

MARKER = '# Written by mmevm: python -m mmevm.mmcv_ops uninstall removes it.'
STUB = f'''{MARKER}
"""Stands in for mmcv's compiled operators, which this mmcv came without."""

try:
    from mmevm.mmcv_ops.ext import *  # noqa: F403
    from mmevm.mmcv_ops.ext import __getattr__  # noqa: F401
except ModuleNotFoundError as error:
    if error.name is None or error.name.split('.')[0] != 'mmevm':
        raise
    raise ImportError(
        f'{{__file__}} hands over to mmevm, which is not installed any more. Delete that file, or install mmevm again.'
    ) from error
'''


class StubError(Exception):
    """What keeps the stub from being written or removed, as a sentence."""


def install() -> str:
    """Write the stub. Returns what was done, as a sentence.

    Raises:
        StubError: If there is no mmcv, or the file cannot be written or is somebody else's.
    """
    folder = _mmcv_folder()
    compiled = _compiled(folder)
    if compiled:
        return f'Nothing to install: mmcv has its compiled operators, {compiled}.'
    stub = folder / '_ext.py'
    if stub.exists() and not _is_ours(stub):
        raise StubError(
            f'{stub} is there already and mmevm did not write it, so it stays as it is. Move it away first.'
        )
    try:
        stub.write_text(STUB)
    except OSError as error:
        raise StubError(f'{stub} cannot be written: {error.strerror}.') from error
    return f"Installed {stub}: mmcv's operators are now mmevm's wherever mmcv has no compiled ones."


def uninstall() -> str:
    """Remove the stub. Returns what was done, as a sentence.

    Raises:
        StubError: If there is no mmcv, or the file cannot be removed or is somebody else's.
    """
    stub = _mmcv_folder() / '_ext.py'
    if not stub.exists():
        return f'Nothing to remove: there is no {stub}.'
    if not _is_ours(stub):
        raise StubError(f'{stub} was not written by mmevm, so it stays.')
    try:
        stub.unlink()
        Path(importlib.util.cache_from_source(str(stub))).unlink(missing_ok=True)
    except OSError as error:
        raise StubError(f'{stub} cannot be removed: {error.strerror}.') from error
    return f'Removed {stub}.'


def status() -> str:
    """Say where ``mmcv._ext`` comes from.

    Raises:
        StubError: If there is no mmcv.
    """
    folder = _mmcv_folder()
    stub = folder / '_ext.py'
    if not stub.exists():
        note = f'There is no {stub}.'
    elif _is_ours(stub):
        note = f"{stub} is mmevm's."
    else:
        note = f'{stub} is there, and mmevm did not write it.'
    compiled = _compiled(folder)
    if compiled:
        return f'mmcv has its compiled operators, {compiled}, and Python prefers them to anything else. {note}'
    if stub.exists():
        return f'mmcv has no compiled operators. {note}'
    return f"mmcv has no compiled operators. {note} mmevm's stand in from the moment that mmevm is imported."


def _mmcv_folder() -> Path:
    spec = importlib.util.find_spec('mmcv')
    if spec is None or spec.origin is None:
        raise StubError("mmcv is not installed here: in mmevm's folder, pip install -e '.[onedl]'.")
    return Path(spec.origin).parent


def _compiled(folder: Path) -> Path | None:
    """The compiled operators that this Python would load."""
    candidates = [folder / f'_ext{suffix}' for suffix in EXTENSION_SUFFIXES]
    return next((path for path in candidates if path.exists()), None)


def _is_ours(stub: Path) -> bool:
    with stub.open(encoding='utf-8', errors='replace') as file:
        return file.readline().rstrip('\n') == MARKER
