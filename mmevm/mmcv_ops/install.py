"""Write ``mmcv/_ext.py``, a file that imports the fallback operators of mmevm.

Programs that import ``mmcv.ops`` before they import mmevm need it, because :func:`.finder.register` runs too late.
"""

import importlib.util
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

MARKER = '# Written by mmevm: python -m mmevm.mmcv_ops uninstall removes it.'
EXT_FILE = f'''{MARKER}
"""Fallback for the compiled operators that this mmcv does not have."""

try:
    from mmevm.mmcv_ops.ext import *  # noqa: F403
    from mmevm.mmcv_ops.ext import __getattr__  # noqa: F401
except ModuleNotFoundError as error:
    if error.name is None or error.name.split('.')[0] != 'mmevm':
        raise
    raise ImportError(
        f'{{__file__}} imports mmevm, which is no longer installed. Delete this file or install mmevm again.'
    ) from error
'''


class InstallError(Exception):
    """``mmcv/_ext.py`` cannot be written or removed. The message says why and what to do."""


def install() -> str:
    """Write ``mmcv/_ext.py`` unless mmcv has compiled operators. Return a message for the user.

    Raises:
        InstallError: If mmcv is not installed, the file cannot be written, or it exists and mmevm did not write it.
    """
    folder = _mmcv_folder()
    compiled = _find_compiled(folder)
    if compiled:
        return f'Nothing to install: mmcv has compiled operators ({compiled}).'
    file = folder / '_ext.py'
    if file.exists() and not _is_ours(file):
        raise InstallError(
            f'{file} already exists and was not written by mmevm. Move or delete it, then run this command again.'
        )
    try:
        file.write_text(EXT_FILE)
    except OSError as error:
        raise InstallError(f'Cannot write {file}: {error.strerror}.') from error
    return f'Installed {file}. mmcv uses the fallback operators of mmevm unless it has compiled ones.'


def uninstall() -> str:
    """Remove ``mmcv/_ext.py`` if mmevm wrote it. Return a message for the user.

    Raises:
        InstallError: If mmcv is not installed, the file cannot be removed, or mmevm did not write it.
    """
    file = _mmcv_folder() / '_ext.py'
    if not file.exists():
        return f'Nothing to remove: {file} does not exist.'
    if not _is_ours(file):
        raise InstallError(f'{file} was not written by mmevm. Delete it yourself if you no longer need it.')
    try:
        file.unlink()
        Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)
    except OSError as error:
        raise InstallError(f'Cannot remove {file}: {error.strerror}.') from error
    return f'Removed {file}.'


def status() -> str:
    """Return a message that says which operators mmcv uses.

    Raises:
        InstallError: If mmcv is not installed.
    """
    folder = _mmcv_folder()
    file = folder / '_ext.py'
    if not file.exists():
        note = f'{file} does not exist.'
    elif _is_ours(file):
        note = f'{file} was written by mmevm.'
    else:
        note = f'{file} was not written by mmevm.'
    compiled = _find_compiled(folder)
    if compiled:
        return f'mmcv uses its compiled operators ({compiled}). {note}'
    if file.exists():
        return f'mmcv has no compiled operators and uses _ext.py. {note}'
    return f'mmcv has no compiled operators. {note} The fallback operators are used once mmevm is imported.'


def _mmcv_folder() -> Path:
    spec = importlib.util.find_spec('mmcv')
    if spec is None or spec.origin is None:
        raise InstallError("mmcv is not installed. Run pip install -e '.[onedl]' in the folder of mmevm.")
    return Path(spec.origin).parent


def _find_compiled(folder: Path) -> Path | None:
    """Return the compiled operators that this Python would import."""
    candidates = [folder / f'_ext{suffix}' for suffix in EXTENSION_SUFFIXES]
    return next((path for path in candidates if path.exists()), None)


def _is_ours(file: Path) -> bool:
    with file.open(encoding='utf-8', errors='replace') as lines:
        return lines.readline().rstrip('\n') == MARKER
