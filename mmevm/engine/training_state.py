"""A training's checkpoint is looked at before mmengine resumes from it, which unpickles it, and runs what it names."""

import argparse
import collections
import datetime
import decimal
import fractions
import io
import os
import pathlib
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import Pickler, UnpicklingError
from typing import Any

import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

from mmevm.checkpoints.convert import check_values, unwrap
from mmevm.checkpoints.read import (
    Inert,
    RestrictedUnpickler,
    detect_format,
    pickle_module,
    prefix_errors,
    wrap_read_errors,
)
from mmevm.errors import CheckpointError

# Statistics of a log and OneCycleLR's function are saved as getattr(class, name): these are all there are.
_ATTRIBUTES = {
    HistoryBuffer: ('min', 'max', 'current', 'mean'),
    OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear'),
}


def _path(thing: Any) -> str:
    return f'{thing.__module__}.{thing.__qualname__}'


def _attribute(owner: type, name: str) -> Any:
    """``getattr`` without its power: from a function it leads to all of Python."""
    if name not in _ATTRIBUTES.get(owner, ()):
        raise UnpicklingError(f'{name} of {owner} is not admitted')
    return getattr(owner, name)


# numpy writes either name for its private module, as its version is 1 or 2.
_RECONSTRUCTING: tuple[Any, ...] = (np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0])
_NUMPY = {
    f'numpy.{core}.multiarray.{function.__name__}': function
    for core in ('core', '_core')
    for function in _RECONSTRUCTING
}
_CALLABLES: dict[str, Callable] = {'builtins.getattr': _attribute, **_NUMPY}
# Values that users keep in meta. Creating one runs nothing else, and torch.load(weights_only=True) can create it.
_METADATA: tuple[type, ...] = (
    *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone),
    *(type(Path()), pathlib.PurePosixPath, pathlib.PureWindowsPath),
    *(
        collections.Counter,
        decimal.Decimal,
        fractions.Fraction,
        uuid.UUID,
        range,
        slice,
        argparse.Namespace,
        ConfigDict,
    ),
)
_CLASSES = (HistoryBuffer, OneCycleParamScheduler, np.ndarray, np.dtype, *_METADATA)
# Beyond tensors and plain containers; torch.load(weights_only=True) admits these too.
_OTHERS = ('torch.device', 'builtins.bytearray', '_codecs.encode', 'builtins.xrange')  # range, in protocol 2


def training_globals() -> list[Any]:
    """What a training's checkpoint names beyond what ``torch.load(weights_only=True)`` admits.

    Returns:
        For ``torch.serialization.add_safe_globals``, so that an mmengine that leaves it to torch what may be read can
        read its own checkpoints.
    """
    kinds = [type(np.dtype(code)) for code in np.typecodes['All']]
    return [*_CLASSES, set, frozenset, complex, *dict.fromkeys(kinds), *_NAMED]


def _under(path: str, function: Callable) -> Callable:
    """A function that torch finds under another name."""

    def named(*args: Any) -> Any:
        return function(*args)

    named.__module__, _, named.__name__ = path.rpartition('.')
    named.__qualname__ = named.__name__
    return named


_NAMED = [_under(path, function) for path, function in _CALLABLES.items()]  # once: torch keeps a set of them


_WEIGHTS_ONLY = 'holds weights only: a training can start from it (init_cfg or load_from), but not be resumed'


def check_training_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Make sure that a training can be resumed from a file, and that this runs nothing that the file brings.

    mmengine unpickles what ``--resume`` names, and runs what a pickle asks for if need be.

    Args:
        path: A local file, whose tensors are not kept.

    Returns:
        What the training says of itself: 'epoch', 'iter', 'seed' and more.

    Raises:
        CheckpointError: If there is no such file, if it is damaged, if it is that of weights alone, or if it names an
            object of a class that neither mmengine nor plain metadata needs. A class of one's own is admitted by
            ``torch.serialization.add_safe_globals``.
    """
    path = Path(path).expanduser()
    layout = detect_format(path)
    if layout == 'safetensors':
        raise CheckpointError(f'{path} {_WEIGHTS_ONLY}.')
    if layout == 'legacy':
        raise CheckpointError(
            f"{path} is in torch.save's old format, which mmengine does not write: no training can be resumed from it."
        )
    with wrap_read_errors(path), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            content = torch.load(
                str(path),
                map_location='cpu',
                mmap=True,
                pickle_module=pickle_module(_TrainingUnpickler, path),
                weights_only=False,
            )
        except _UnknownError as error:
            raise CheckpointError(
                f'{path} names {error}, which a training does not save and which might do anything when it is resumed: '
                'nothing of it was run. If the file is your own, and this belongs there, admit it by '
                "torch.serialization.add_safe_globals in a module of the config's custom_imports."
            ) from error
    _check_content(content, str(path))
    return content['meta']


def read_training_meta(path: Path) -> dict[str, Any] | None:
    """Read the metadata of a training's checkpoint, without its tensors and without a check of the whole file.

    Args:
        path: A local file.

    Returns:
        Its 'epoch', 'iter' and more, with empty shells in place of all objects; None if the file is something else
        than a training's checkpoint, such as converted weights.

    Raises:
        CheckpointError: If the file is damaged.
    """
    with wrap_read_errors(path):
        with path.open('rb') as file:
            if file.read(1) == b'\x80':  # torch.save's old format, in which mmengine does not write
                return None
        with zipfile.ZipFile(path) as archive:
            records = [record for record in archive.infolist() if record.filename.endswith('/data.pkl')]
            if not records:
                return None
            if not records[0].CRC:  # torch.serialization.set_crc32_options(False)
                del records[0].CRC  # zipfile then does not compare it
            content = _MetaUnpickler(io.BytesIO(archive.read(records[0]))).load()
    if not (isinstance(content, dict) and content.get('message_hub') and isinstance(content.get('meta'), dict)):
        return None
    meta = content['meta']
    return meta if all(type(meta.get(name)) is int for name in ('epoch', 'iter')) else None


def find_unresumable(checkpoint: dict[str, Any]) -> list[str]:
    """Find what :func:`check_training_checkpoint` will refuse in a checkpoint that is about to be saved.

    Returns:
        One message for each problem; empty if the checkpoint can be resumed from.
    """
    keys: dict[str, str] = {}  # the first one for each name: a list may hold thousands
    for key, name in _unadmitted(checkpoint):
        keys.setdefault(name, key)
    problems = [
        f'{key} names {name}: --resume will refuse this checkpoint, because an object of an unknown class might run '
        'anything when it is read. Save it as a plain type (str, float, list, dict), or admit the class by '
        "torch.serialization.add_safe_globals in a module of the config's custom_imports."
        for name, key in keys.items()
    ]
    try:
        _check_content(checkpoint, 'The checkpoint that is saved')
    except CheckpointError as error:
        problems.append(f'{error} --resume will refuse it.')
    return problems


def _unadmitted(value: Any, key: str = '') -> Iterator[tuple[str, str]]:
    """Find values of classes that are not admitted: yield the innermost key and the name of the class."""
    stream = io.BytesIO()
    try:
        _TensorlessPickler(stream, protocol=2).dump(value)
        stream.seek(0)
        _TensorlessUnpickler(stream).load()
    except _UnknownError as error:
        is_list = isinstance(value, (list, tuple))
        items = value.items() if isinstance(value, dict) else enumerate(value) if is_list else ()
        inner = [found for name, item in items for found in _unadmitted(item, f'{key}.{name}' if key else str(name))]
        yield from inner or [(key, str(error))]
    except Exception:  # torch.save raises the same error
        return


def _check_content(content: Any, name: str) -> None:
    """Check that mmengine can resume from the content of a checkpoint, which messages call ``name``."""
    if not isinstance(content, dict):
        raise CheckpointError(f'A checkpoint is a dict, but {name} holds a {type(content).__name__}.')
    entries = ('state_dict', 'meta', 'message_hub')
    missing = [entry for entry in entries if not (isinstance(content.get(entry), dict) and content[entry])]
    if not isinstance(content.get('optimizer', {}), dict):
        missing.append('optimizer')
    if missing:
        raise CheckpointError(f'{name} {_WEIGHTS_ONLY}, for which {", ".join(missing)} would be needed.')
    meta = content['meta']
    if any(type(meta.get(entry)) is not int or meta[entry] < 0 for entry in ('epoch', 'iter')):
        raise CheckpointError(f'{name} does not say after which epoch and iteration it was saved (meta).')
    if 'config' in meta:  # mmengine saves 'cfg'
        raise CheckpointError(f"{name} has a meta['config'], which mmengine would run as Python: it is not resumed.")
    _check_message_hub(content['message_hub'], name)
    state, _, _ = unwrap({'state_dict': content['state_dict']})
    # Which names are buffers is not known without the model, and a buffer may hold -inf, as a mask does, or NaN. A
    # training that diverged has NaN in these too.
    suffixes = ('weight', 'bias', 'running_mean', 'running_var')
    finite = {key: tensor for key, tensor in state.items() if key.rpartition('.')[2] in suffixes}
    with prefix_errors(name):
        check_values(finite, [key for key, tensor in finite.items() if not tensor.is_floating_point()])


def _check_message_hub(hub: dict[str, Any], path: str) -> None:
    """What mmengine remembers of files is what CheckpointHook removes when it saves the next one."""
    if not all(isinstance(hub.get(name), dict) for name in ('log_scalars', 'runtime_info', 'resumed_keys')):
        raise CheckpointError(f"{path} has a message_hub that is not mmengine's: a training cannot be resumed from it.")
    for name, value in hub['runtime_info'].items():
        is_best = str(name).startswith('best_ckpt') and value is not None
        if (is_best and not (isinstance(value, str) and Path(value).name.startswith('best_'))) or (
            name == 'keep_ckpt_ids' and not (isinstance(value, list) and all(type(step) is int for step in value))
        ):
            raise CheckpointError(
                f'{path} has {value!r} as its {name}, which mmengine would remove after the next checkpoint, but which '
                'is none: it is not resumed.'
            )


class _UnknownError(Exception):
    """The name of an object that a training's checkpoint does not hold."""


class _TrainingUnpickler(RestrictedUnpickler):
    """Goes through all that a pickle names, and fails at what a training does not save."""

    def unknown(self, path: str) -> Any:
        if path == 'builtins.getattr':
            return _check_attribute
        admitted: list[Any] = getattr(torch.serialization, 'get_safe_globals', list)()
        registered = {thing[1] if isinstance(thing, tuple) else _path(thing) for thing in admitted}
        if path in {*_CALLABLES, *map(_path, _CLASSES), *_OTHERS, *registered}:
            return super().unknown(path)
        raise _UnknownError(path)


class _MetaUnpickler(RestrictedUnpickler):
    """Reads plain values, and puts shells in place of all objects, tensors included."""

    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if name == 'OrderedDict' else self.unknown(f'{module}.{name}')

    def persistent_load(self, storage: Any) -> None:
        return None


class _TensorlessPickler(Pickler):
    """Writes what ``torch.save`` does, without the tensors."""

    def persistent_id(self, value: Any) -> str | None:
        is_plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided
        return 'tensor' if is_plain and not value.is_quantized else None


class _TensorlessUnpickler(_TrainingUnpickler):
    """Reads what :class:`_TensorlessPickler` has written."""

    def persistent_load(self, tensor: Any) -> None:
        return None


def _check_attribute(owner: Any, name: Any) -> Inert:
    owners = {_path(known): names for known, names in _ATTRIBUTES.items()}
    owner = getattr(owner, '__name__', type(owner).__name__)
    if name not in owners.get(owner, ()):
        raise _UnknownError(f'{name} of {owner}')
    return Inert()
