"""Check a training checkpoint, and load it for mmengine, which would run what a pickle names."""

import argparse
import collections
import datetime
import decimal
import fractions
import io
import os
import pathlib
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickle import Pickler
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.runner.checkpoint import CheckpointLoader

from mmevm.checkpoints.read import (
    SAFE_GLOBALS,
    RestrictedUnpickler,
    detect_format,
    load_restricted,
    prefix_errors,
    wrap_read_errors,
)
from mmevm.checkpoints.state_dict import check_values, unwrap
from mmevm.errors import CheckpointError


class _UnknownObjectError(CheckpointError):
    """A training checkpoint names an object that mmengine does not save. The message is its import path."""


def _path(thing: Any) -> str:
    return f'{thing.__module__}.{thing.__qualname__}'


# Statistics of a log and OneCycleLR's function are saved as getattr(class, name): these are all of them.
_ATTRIBUTES = {
    HistoryBuffer: ('min', 'max', 'current', 'mean'),
    OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear'),
}


def _safe_getattr(owner: Any, name: Any) -> Any:
    """Restrict ``getattr``, which leads from any function to all of Python."""
    if not (isinstance(owner, type) and name in _ATTRIBUTES.get(owner, ())):
        raise _UnknownObjectError(f'{name} of {_path(owner) if isinstance(owner, type) else type(owner).__name__}')
    return getattr(owner, name)


# Values that users keep in meta. Creating one runs no other code.
_METADATA_CLASSES: tuple[type, ...] = (
    *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone),
    *(type(Path()), pathlib.PurePosixPath, pathlib.PureWindowsPath),
    *(collections.Counter, decimal.Decimal, fractions.Fraction, uuid.UUID, range, slice),
    *(argparse.Namespace, ConfigDict, bytes, bytearray),
)
_RECONSTRUCT_ARRAY, _SCALAR = np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0]
TRAINING_GLOBALS: dict[str, Any] = {
    **SAFE_GLOBALS,
    **{_path(cls): cls for cls in (HistoryBuffer, OneCycleParamScheduler, np.ndarray, np.dtype, *_METADATA_CLASSES)},
    # NumPy 1 and 2 have different names for the same module.
    **{f'numpy.{core}.multiarray._reconstruct': _RECONSTRUCT_ARRAY for core in ('core', '_core')},
    **{f'numpy.{core}.multiarray.scalar': _SCALAR for core in ('core', '_core')},
    'builtins.getattr': _safe_getattr,
    'builtins.xrange': range,  # in protocol 2
    'torch.device': torch.device,
    '_codecs.encode': lambda text, encoding: text.encode('latin1'),  # bytes in protocol 2
}


class TrainingUnpickler(RestrictedUnpickler):
    """Restricted unpickler for training checkpoints, which refuses all objects that a training does not save.

    Classes that are registered by ``torch.serialization.add_safe_globals`` are allowed too.
    """

    safe_globals = TRAINING_GLOBALS

    def find_unknown(self, path: str) -> Any:
        """Return a registered object.

        Raises:
            _UnknownObjectError: If the object is not registered.
        """
        for entry in getattr(torch.serialization, 'get_safe_globals', list)():
            thing, name = entry if isinstance(entry, tuple) else (entry, _path(entry))
            if name == path:
                return thing
        raise _UnknownObjectError(path)


_WEIGHTS_ONLY = 'holds weights only: a training can start from it (init_cfg or load_from), but not be resumed'


@CheckpointLoader.register_scheme(prefixes='resume://', force=True)
def load_from_training(filename: str, map_location: str | None = None) -> dict[str, Any]:
    """Load a training checkpoint for mmengine: ``load_from='resume://epoch_3.pth', resume=True``.

    Args:
        filename: ``resume://`` and an argument of :func:`read_training_checkpoint`.
        map_location: Device of the tensors; None is the CPU.
    """
    return read_training_checkpoint(filename.removeprefix('resume://'), map_location=map_location)


def check_training_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Check that a training can be resumed from a file, without keeping its tensors in memory.

    Returns:
        The metadata of the training: 'epoch', 'iter', 'seed' and more.

    Raises:
        CheckpointError: See :func:`read_training_checkpoint`.
    """
    return read_training_checkpoint(path, mmap=True)['meta']


def read_training_checkpoint(path: str | os.PathLike, map_location: str | None = None, mmap: bool = False) -> dict:
    """Read a training checkpoint without running anything from it.

    Args:
        path: A local file.
        map_location: Device of the tensors; None is the CPU.
        mmap: Whether to map the tensors of the file instead of reading them.

    Returns:
        The checkpoint, from which mmengine can resume.

    Raises:
        CheckpointError: If the file does not exist, is damaged or has weights only, or if it names an object that a
            training does not save.
    """
    path = Path(path).expanduser()
    file_format = detect_format(path)
    if file_format == 'safetensors':
        raise CheckpointError(f'{path} {_WEIGHTS_ONLY}.')
    if file_format == 'legacy':
        raise CheckpointError(f"{path} is in torch.save's old format, in which mmengine saves no training checkpoints.")
    try:
        content = load_restricted(path, TrainingUnpickler, map_location=map_location or 'cpu', mmap=mmap)
    except _UnknownObjectError as error:
        raise CheckpointError(
            f'{path} names {error}, which a training does not save and which could run any code. Nothing was run. If '
            'the file is your own and needs this object, register it by torch.serialization.add_safe_globals in a '
            "module of the config's custom_imports."
        ) from error
    _check_content(content, str(path))
    return content


class _MetaUnpickler(RestrictedUnpickler):
    """Reads plain values. All objects become placeholders, tensors too."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if name == 'OrderedDict' else self.find_unknown(f'{module}.{name}')

    def persistent_load(self, pid: Any) -> None:
        return None


def read_training_meta(path: Path) -> dict[str, Any] | None:
    """Read the metadata of a training checkpoint, without reading its tensors or verifying their checksums.

    Args:
        path: A local file.

    Returns:
        The metadata: 'epoch', 'iter' and more, with placeholders for objects; None if the file is not a training
        checkpoint.

    Raises:
        CheckpointError: If the file is damaged.
    """
    with wrap_read_errors(path):
        with path.open('rb') as file:
            if file.read(1) == b'\x80':  # torch.save's old format, which mmengine does not use
                return None
        with zipfile.ZipFile(path) as archive:
            records = [record for record in archive.infolist() if record.filename.endswith('/data.pkl')]
            if not records:
                return None
            if not records[0].CRC:  # torch.serialization.set_crc32_options(False)
                del records[0].CRC  # zipfile does not compare it then
            content = _MetaUnpickler(io.BytesIO(archive.read(records[0]))).load()
    if not (isinstance(content, dict) and content.get('message_hub') and isinstance(content.get('meta'), dict)):
        return None
    meta = content['meta']
    return meta if all(type(meta.get(name)) is int for name in ('epoch', 'iter')) else None


def find_unresumable(checkpoint: dict[str, Any]) -> list[str]:
    """Find the reasons for which :func:`read_training_checkpoint` will refuse a checkpoint that is about to be saved.

    Returns:
        One message per problem; empty if the checkpoint can be resumed from.
    """
    keys: dict[str, str] = {}  # the first one for each name: a list may hold thousands
    for key, name in _find_unknown_objects(checkpoint):
        keys.setdefault(name, key)
    problems = [
        f'{key} contains {name}, an object of an unknown class, which could run any code when it is read: --resume '
        'will refuse this checkpoint. Save a plain type (str, float, list, dict) instead, or register the class by '
        "torch.serialization.add_safe_globals in a module of the config's custom_imports."
        for name, key in keys.items()
    ]
    try:
        _check_content(checkpoint, 'The checkpoint')
    except CheckpointError as error:
        problems.append(f'{error} --resume will refuse it.')
    return problems


class _TensorlessPickler(Pickler):
    """Writes what ``torch.save`` does, without the tensors."""

    def persistent_id(self, value: Any) -> str | None:
        is_plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
        return 'tensor' if is_plain and not value.is_quantized else None


class _TensorlessUnpickler(TrainingUnpickler):
    """Reads what :class:`_TensorlessPickler` has written."""

    def persistent_load(self, pid: Any) -> None:
        return None


def _find_unknown_objects(value: Any, key: str = '') -> Iterator[tuple[str, str]]:
    """Yield the innermost key and the import path of each object that is not allowed."""
    stream = io.BytesIO()
    try:
        _TensorlessPickler(stream, protocol=2).dump(value)
        stream.seek(0)
        _TensorlessUnpickler(stream).load()
    except _UnknownObjectError as error:
        is_list = isinstance(value, (list, tuple))
        items = value.items() if isinstance(value, dict) else enumerate(value) if is_list else ()
        inner = [
            found
            for name, item in items
            for found in _find_unknown_objects(item, f'{key}.{name}' if key else str(name))
        ]
        yield from inner or [(key, str(error))]
    except Exception:  # torch.save raises the same error
        return


def _check_content(content: Any, name: str) -> None:
    """Check that mmengine can resume from a checkpoint, and would run or remove nothing of the file's choice."""
    if not isinstance(content, dict):
        raise CheckpointError(f'{name} holds a {type(content).__name__}, but a checkpoint is a dict.')
    entries = ('state_dict', 'meta', 'message_hub')
    missing = [entry for entry in entries if not (isinstance(content.get(entry), dict) and content[entry])]
    if not isinstance(content.get('optimizer', {}), dict):
        missing.append('optimizer')
    if missing:
        raise CheckpointError(f'{name} {_WEIGHTS_ONLY}, which needs {", ".join(missing)}.')
    meta = content['meta']
    if any(type(meta.get(entry)) is not int or meta[entry] < 0 for entry in ('epoch', 'iter')):
        raise CheckpointError(f"{name} has no valid meta['epoch'] and meta['iter']: it cannot be resumed from.")
    if 'config' in meta:  # mmengine saves 'cfg'
        raise CheckpointError(f"{name} has a meta['config'], which mmengine would run as Python: it is not resumed.")
    hub = content['message_hub']
    if not all(isinstance(hub.get(entry), dict) for entry in ('log_scalars', 'runtime_info', 'resumed_keys')):
        raise CheckpointError(f"{name} has a message_hub that is not mmengine's: it cannot be resumed from.")
    for entry, value in hub['runtime_info'].items():  # CheckpointHook removes these files when it saves the next one
        is_best = str(entry).startswith('best_ckpt') and value is not None
        if (is_best and not (isinstance(value, str) and Path(value).name.startswith('best_'))) or (
            entry == 'keep_ckpt_ids' and not (isinstance(value, list) and all(type(step) is int for step in value))
        ):
            raise CheckpointError(
                f'{name} has {entry}={value!r}, which mmengine would remove after the next checkpoint, but which is '
                'not a checkpoint: it is not resumed.'
            )
    with prefix_errors(name):
        state, _, _ = unwrap({'state_dict': content['state_dict']})
        # Which names are buffers is not known without the model, and a buffer may hold -inf or NaN, as a mask does. A
        # training that diverged has NaN in these too.
        suffixes = ('weight', 'bias', 'running_mean', 'running_var')
        learned = {key: tensor for key, tensor in state.items() if key.rpartition('.')[2] in suffixes}
        check_values(learned, [key for key, tensor in learned.items() if not tensor.is_floating_point()])
