"""A file of weights becomes tensors, and nothing in it is run."""

import os
import pickle
import types
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, is not recognised or does not hold what it must; the message says what to do."""


def read_checkpoint(path: str | os.PathLike, map_location: str | None = None) -> Any:
    """Read a local file of weights without running anything from it.

    Tensors and plain containers come back as they were saved. Objects of any other class (a config, arguments, numpy
    arrays) come back as empty shells. So their classes need not be installed, and a file made to do harm does none.

    Args:
        path: A file of ``torch.save``, in its zip or its legacy format, or of safetensors.
        map_location: Device of the tensors; None is the CPU.

    Returns:
        What was saved, a dict as a rule.

    Raises:
        CheckpointError: If there is no such file, or if it is something else than weights, or damaged.
    """
    path, device = Path(path).expanduser(), map_location or 'cpu'
    if path.is_dir():
        raise CheckpointError(f'{path} is a directory: name the file of weights in it.')
    if not path.is_file():
        raise CheckpointError(f'There is no checkpoint {path}: check the path.')
    content = path.read_bytes()
    if not content:
        raise CheckpointError(f'{path} is empty: fetch it again.')
    if b'constants.pkl' in content:  # torch.load would hand such a file to torch.jit.load, which runs code
        raise CheckpointError(f'{path} is a TorchScript program, not a checkpoint: ask its author for the state_dict.')
    try:
        if content[8:9] == b'{':  # safetensors: 8 bytes that give the length of a JSON header, and that header
            return safetensors.torch.load_file(path, device=device)
        if content.startswith((b'PK\x03\x04', b'\x80')):
            with warnings.catch_warnings():  # about old pickles: the reader of a log cannot act on these
                warnings.simplefilter('ignore')
                return torch.load(path, map_location=device, pickle_module=_INERT_PICKLE, weights_only=False)
    except Exception as error:  # damaged bytes make the readers fail in any way there is
        raise CheckpointError(f'{path} is cut off or damaged and cannot be read: fetch it again ({error}).') from error
    kind = 'text, perhaps a web page in place of a download' if content[:512].isascii() else 'of no known format'
    raise CheckpointError(f'{path} is {kind}: a file of torch.save (.pth, .pt, .bin) or of safetensors is needed.')


class _Inert:
    """In place of an object whose class is not admitted: accepts all that unpickling does to it, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> '_Inert':
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _accept(self, *args: Any, **kwargs: Any) -> None:
        pass

    __call__ = __setstate__ = __setitem__ = append = extend = add = _accept


class _Admitted:
    """A callable that a pickle may call, and of which it can change nothing."""

    __slots__ = ('function',)

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: Any) -> None:
        pass


# A parameter, or a tensor that carries attributes, is read as the tensor within.
_ADMITTED = {
    'collections.OrderedDict': OrderedDict,
    'torch.Size': torch.Size,
    'torch._utils._rebuild_tensor': torch._utils._rebuild_tensor,
    'torch._utils._rebuild_tensor_v2': torch._utils._rebuild_tensor_v2,
    'torch._utils._rebuild_parameter': lambda data, *_: data,
    'torch._utils._rebuild_parameter_with_state': lambda data, *_: data,
    'torch._tensor._rebuild_from_type_v2': lambda rebuild, _type, args, _state: rebuild(*args),
    **{f'builtins.{plain.__name__}': plain for plain in (dict, list, tuple, set, frozenset, complex)},
}


class _InertUnpickler(pickle.Unpickler):
    """Admits what tensors and plain containers are made of. torch.load itself adds the storages."""

    def find_class(self, module: str, name: str) -> Any:
        path = f'{module}.{name}'.replace('__builtin__.', 'builtins.')  # as protocol 2 writes it
        if path in _ADMITTED:
            return _Admitted(_ADMITTED[path])
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return type(path, (_Inert,), {})


_INERT_PICKLE = types.SimpleNamespace(
    __name__='inert_pickle',
    Unpickler=_InertUnpickler,
    load=lambda file, **kwargs: _InertUnpickler(file, **kwargs).load(),
)
