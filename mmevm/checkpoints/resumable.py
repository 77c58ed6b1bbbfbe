"""A training's checkpoint is looked at before mmengine resumes from it, which unpickles it, and runs what it names."""

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler

from .converting import check_values, unwrap
from .reading import CheckpointError, Inert, InertUnpickler, damage_named, file_named, layout_of, pickle_module

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
_CLASSES = (HistoryBuffer, OneCycleParamScheduler, np.ndarray, np.dtype)
# Beyond tensors and plain containers; torch.load(weights_only=True) admits these too.
_OTHERS = ('collections.Counter', 'torch.device', 'builtins.bytearray', '_codecs.encode')


def training_globals() -> list[Any]:
    """What a training's checkpoint names beyond what ``torch.load(weights_only=True)`` admits.

    Returns:
        For ``torch.serialization.add_safe_globals``, so that an mmengine that leaves it to torch what may be read can
        read its own checkpoints.
    """
    kinds = [type(np.dtype(code)) for code in np.typecodes['AllInteger'] + np.typecodes['Float'] + '?']
    return [*_CLASSES, *dict.fromkeys(kinds), *_NAMED]


def _under(path: str, function: Callable) -> Callable:
    """A function that torch finds under another name."""

    def named(*args: Any) -> Any:
        return function(*args)

    named.__module__, _, named.__name__ = path.rpartition('.')
    named.__qualname__ = named.__name__
    return named


_NAMED = [_under(path, function) for path, function in _CALLABLES.items()]  # once: torch keeps a set of them


def check_training_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """Make sure that a training can be resumed from a file, and that this runs nothing that the file brings.

    mmengine unpickles what ``--resume`` names, and runs what a pickle asks for if need be.

    Args:
        path: A local file, whose tensors are not kept.

    Returns:
        What the training says of itself: 'epoch', 'iter', 'seed' and more.

    Raises:
        CheckpointError: If there is no such file, if it is damaged, if it is that of weights alone, or if it names an
            object that mmengine does not save. A class of one's own is admitted by
            ``torch.serialization.add_safe_globals``.
    """
    path = Path(path).expanduser()
    weights_only = (
        f'{path} holds weights only: a training can start from it (init_cfg or load_from), but not be resumed'
    )
    layout = layout_of(path)
    if layout == 'safetensors':
        raise CheckpointError(f'{weights_only}.')
    if layout == 'legacy':
        raise CheckpointError(
            f"{path} is in torch.save's old format, which mmengine does not write: no training can be resumed from it."
        )
    with damage_named(path), warnings.catch_warnings():
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
    if not isinstance(content, dict):
        raise CheckpointError(f'A checkpoint is a dict, but {path} holds a {type(content).__name__}.')
    entries = ('state_dict', 'meta', 'optimizer', 'message_hub')
    if missing := [name for name in entries if not (isinstance(content.get(name), dict) and content[name])]:
        raise CheckpointError(f'{weights_only}, for which {", ".join(missing)} would be needed.')
    meta = content['meta']
    if any(type(meta.get(name)) is not int or meta[name] < 0 for name in ('epoch', 'iter')):
        raise CheckpointError(f'{path} does not say after which epoch and iteration it was saved (meta).')
    if 'config' in meta:  # mmengine saves 'cfg'
        raise CheckpointError(f"{path} has a meta['config'], which mmengine would run as Python: it is not resumed.")
    _check_message_hub(content['message_hub'], path)
    state, _, _ = unwrap({'state_dict': content['state_dict']})
    with file_named(str(path)):
        check_values(state, [name for name, tensor in state.items() if not tensor.is_floating_point()])
    return meta


def _check_message_hub(hub: dict[str, Any], path: Path) -> None:
    """What mmengine remembers of files is what CheckpointHook removes when it saves the next one."""
    if not all(isinstance(hub.get(name), dict) for name in ('log_scalars', 'runtime_info', 'resumed_keys')):
        raise CheckpointError(f"{path} has a message_hub that is not mmengine's: a training cannot be resumed from it.")
    for name, value in hub['runtime_info'].items():
        is_best = str(name).startswith('best_ckpt') and value is not None
        if (is_best and not (isinstance(value, str) and re.fullmatch(r'best_.*\.pth', Path(value).name))) or (
            name == 'keep_ckpt_ids' and not (isinstance(value, list) and all(type(step) is int for step in value))
        ):
            raise CheckpointError(
                f'{path} has {value!r} as its {name}, which mmengine would remove after the next checkpoint, but which '
                'is none: it is not resumed.'
            )


class _UnknownError(Exception):
    """The name of an object that a training's checkpoint does not hold."""


class _TrainingUnpickler(InertUnpickler):
    """Goes through all that a pickle names, and fails at what a training does not save."""

    def unknown(self, path: str) -> Any:
        if path == 'builtins.getattr':
            return _check_attribute
        admitted: list[Any] = getattr(torch.serialization, 'get_safe_globals', list)()
        registered = {thing[1] if isinstance(thing, tuple) else _path(thing) for thing in admitted}
        if path in {*_CALLABLES, *map(_path, _CLASSES), *_OTHERS, *registered}:
            return super().unknown(path)
        raise _UnknownError(path)


def _check_attribute(owner: Any, name: Any) -> Inert:
    owners = {_path(known): names for known, names in _ATTRIBUTES.items()}
    owner = getattr(owner, '__name__', type(owner).__name__)
    if name not in owners.get(owner, ()):
        raise _UnknownError(f'{name} of {owner}')
    return Inert()
