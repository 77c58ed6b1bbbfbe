"""A file of weights becomes tensors, and nothing in it is run."""

import contextlib
import math
import mmap
import os
import pickle
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mmevm.errors import CheckpointError


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
    layout = detect_format(path)
    with wrap_read_errors(path):
        if layout == 'safetensors':
            return safetensors.torch.load_file(path, device=device)
        with warnings.catch_warnings():  # about old pickles: the reader of a log cannot act on these
            warnings.simplefilter('ignore')
            return torch.load(
                path, map_location=device, pickle_module=pickle_module(RestrictedUnpickler, path), weights_only=False
            )


def detect_format(path: Path) -> str:
    """Tell 'zip' and 'legacy', of ``torch.save``, and 'safetensors' apart; a zip's bytes are those that were written.

    Raises:
        CheckpointError: If there is no such file, or if it is something else than weights, or damaged.
    """
    with wrap_read_errors(path):
        if path.is_dir():
            raise CheckpointError(f'{path} is a directory: name the file of weights in it.')
        if not path.is_file():
            raise CheckpointError(f'There is no checkpoint {path}: check the path.')
        if not path.stat().st_size:
            raise CheckpointError(f'{path} is empty: fetch it again.')
        with path.open('rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start, is_program = content[:512], content.find(b'constants.pkl') >= 0
        if is_program:  # torch.load would hand it to torch.jit.load, which runs code
            raise CheckpointError(
                f'{path} is a TorchScript program, not a checkpoint: ask its author for the state_dict.'
            )
        if start[8:9] == b'{':  # 8 bytes that give the length of a JSON header, and that header
            return 'safetensors'
        if start.startswith(b'PK\x03\x04'):
            _check_archive(path)
            return 'zip'
    if start.startswith(b'\x80'):
        if torch.serialization.MAGIC_NUMBER.to_bytes(10, 'little') in start[:32]:
            return 'legacy'
        raise CheckpointError(f'{path} is a pickle that torch.save has not written, and cannot be read: save it so.')
    kind = 'text, perhaps a web page in place of a download' if start.isascii() else 'of no known format'
    raise CheckpointError(f'{path} is {kind}: a file of torch.save (.pth, .pt, .bin) or of safetensors is needed.')


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if not any(name.endswith('/data.pkl') for name in names):
            raise CheckpointError(
                f'{path} is a zip archive that torch.save has not written, of {len(names)} files: a file of torch.save '
                '(.pth, .pt, .bin) or of safetensors is needed.'
            )
        records = archive.infolist()
        if not any(record.CRC for record in records):  # torch.serialization.set_crc32_options(False)
            if sum(record.file_size for record in records) > path.stat().st_size:
                raise ValueError('its records are larger than the file')
        elif damaged := archive.testzip():  # torch does not compare the checksums
            raise ValueError(f'the bytes of {damaged} are not those that were written')


@contextlib.contextmanager
def wrap_read_errors(path: Path) -> Iterator[None]:
    """What a file's readers run into becomes a sentence."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f'{path} cannot be opened: {error.strerror or error}.') from error
    except Exception as error:  # damaged bytes make the readers fail in any way there is
        reason = ' '.join(str(error).split())
        raise CheckpointError(f'{path} is cut off or damaged and cannot be read: fetch it again ({reason}).') from error


@contextlib.contextmanager
def prefix_errors(checkpoint: str) -> Iterator[None]:
    """What is said of a file's content begins with its name."""
    try:
        yield
    except CheckpointError as error:
        if checkpoint in str(error):
            raise
        raise CheckpointError(f'{checkpoint}: {error}') from error


class Inert:
    """In place of an object whose class is not admitted: accepts all that unpickling does to it, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> 'Inert':
        """Take whatever a class may be created with."""
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


# A tensor may repeat what is stored (``Tensor.expand``), but most operations write every repetition to memory.
_MAX_REPEATED_BYTES = 2**30


def _bounded(rebuild: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Check the shape of a tensor before it is built."""

    def rebuild_bounded(storage: Any, offset: int, size: Iterable[int], *args: Any) -> Tensor:
        stored, needed = storage.untyped().nbytes(), math.prod(size) * storage.dtype.itemsize
        if needed > max(stored, _MAX_REPEATED_BYTES):
            raise ValueError(f'a tensor of shape {tuple(size)} needs {needed} bytes, but the file stores {stored}')
        return rebuild(storage, offset, size, *args)

    return rebuild_bounded


# A parameter, or a tensor that carries attributes, is read as the tensor within.
ADMITTED = {
    'collections.OrderedDict': OrderedDict,
    'torch.Size': torch.Size,
    'torch._utils._rebuild_tensor': _bounded(torch._utils._rebuild_tensor),
    'torch._utils._rebuild_tensor_v2': _bounded(torch._utils._rebuild_tensor_v2),
    'torch._utils._rebuild_parameter': lambda data, *_: data,
    'torch._utils._rebuild_parameter_with_state': lambda data, *_: data,
    'torch._tensor._rebuild_from_type_v2': lambda rebuild, _type, args, _state: rebuild(*args),
    **{f'builtins.{plain.__name__}': plain for plain in (dict, list, tuple, set, frozenset, complex)},
}


class RestrictedUnpickler(pickle.Unpickler):
    """Admits what tensors and plain containers are made of. torch.load itself adds the storages."""

    def find_class(self, module: str, name: str) -> Any:
        """Give what a pickle names, or a shell in its place."""
        path = f'{module}.{name}'.replace('__builtin__.', 'builtins.')  # as protocol 2 writes it
        if path in ADMITTED:
            return _Admitted(ADMITTED[path])
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return self.unknown(path)

    def unknown(self, path: str) -> Any:
        """Give what stands in place of an object that is not admitted."""
        return type(path, (Inert,), {})


def pickle_module(unpickler: type[pickle.Unpickler], path: Path) -> types.SimpleNamespace:
    """Return what ``torch.load`` takes in place of the module pickle.

    Args:
        unpickler: Reads the pickle.
        path: The file, which has to hold as many bytes for each storage as the pickle declares: torch allocates them
            before it reads the file, and older versions read beyond its end.
    """
    with path.open('rb') as file:
        if file.read(2) == b'PK':
            with zipfile.ZipFile(file) as archive:
                records = [(name.split('/'), archive.getinfo(name).file_size) for name in archive.namelist()]
            sizes = {parts[-1]: size for parts, size in records if parts[-2:-1] == ['data']}
        else:
            sizes = None
    file_size = path.stat().st_size

    class BoundedUnpickler(unpickler):  # type: ignore[misc, valid-type]
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, load_bounded(value) if name == 'persistent_load' else value)

    def load_bounded(persistent_load: Callable[[tuple], Any]) -> Callable[[tuple], Any]:
        def load(saved_id: tuple) -> Any:
            if saved_id[0] == 'storage':
                _, kind, key, _, elements, *_ = saved_id
                needed = elements * (1 if kind is torch.UntypedStorage else kind.dtype.itemsize)
                stored = file_size if sizes is None else sizes.get(key, 0)
                if needed > stored:
                    raise ValueError(f'a tensor needs {needed} bytes, but the file stores {stored}')
            return persistent_load(saved_id)

        return load

    return types.SimpleNamespace(
        __name__=unpickler.__name__,
        Unpickler=BoundedUnpickler,
        load=lambda file, **kwargs: BoundedUnpickler(file, **kwargs).load(),
    )
