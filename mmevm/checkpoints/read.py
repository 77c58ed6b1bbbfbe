"""Read checkpoints without running code from them.

All files are read by :class:`RestrictedUnpickler`, not by ``torch.load(weights_only=True)``, which refuses files with
other objects (such as the authors'), does not bound the size of tensors, and could run code before torch 2.6
(CVE-2025-32434).
"""

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

    Tensors and plain containers are read as they were saved. Objects of any other class (a config, arguments, NumPy
    arrays) become empty instances of :class:`UnknownObject`: their classes need not be installed.

    Args:
        path: A file of ``torch.save``, in its zip or its legacy format, or of safetensors.
        map_location: Device of the tensors; None is the CPU.

    Returns:
        The content of the file, usually a dict.

    Raises:
        CheckpointError: If the file does not exist, is damaged or is not a file of weights.
    """
    path, device = Path(path).expanduser(), map_location or 'cpu'
    if detect_format(path) == 'safetensors':
        with wrap_read_errors(path):
            return safetensors.torch.load_file(path, device=device)
    return load_restricted(path, RestrictedUnpickler, map_location=device)


def detect_format(path: Path) -> str:
    """Return the format of a file: 'zip' or 'legacy', of ``torch.save``, or 'safetensors'.

    The checksums of a zip archive are verified.

    Raises:
        CheckpointError: If the file does not exist, is damaged or is not a file of weights.
    """
    with wrap_read_errors(path):
        if path.is_dir():
            raise CheckpointError(f'{path} is a directory. Name the file of weights in it.')
        if not path.is_file():
            raise CheckpointError(f'There is no checkpoint {path}: check the path.')
        if not path.stat().st_size:
            raise CheckpointError(f'{path} is empty. Download or copy it again.')
        with path.open('rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            start, is_program = content[:512], content.find(b'constants.pkl') >= 0
        if is_program:  # torch.load would call torch.jit.load, which runs code
            raise CheckpointError(f'{path} is a TorchScript program, not a checkpoint. Get a file with the state_dict.')
        if start[8:9] == b'{':  # 8 bytes with the length of a JSON header, and the header
            return 'safetensors'
        if start.startswith(b'PK\x03\x04'):
            _check_archive(path)
            return 'zip'
    if start.startswith(b'\x80') and torch.serialization.MAGIC_NUMBER.to_bytes(10, 'little') in start[:32]:
        return 'legacy'
    if start.startswith(b'\x80'):
        kind = 'a pickle that torch.save did not write'
    else:
        kind = 'text, perhaps a web page instead of a download' if start.isascii() else 'of unknown format'
    raise CheckpointError(f'{path} is {kind}. Use a file of torch.save (.pth, .pt, .bin) or of safetensors.')


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if not any(record.filename.endswith('/data.pkl') for record in records):
            raise CheckpointError(
                f'{path} is a zip archive of {len(records)} files that torch.save did not write. Use a file of '
                'torch.save (.pth, .pt, .bin) or of safetensors.'
            )
        if not any(record.CRC for record in records):  # torch.serialization.set_crc32_options(False)
            if sum(record.file_size for record in records) > path.stat().st_size:
                raise ValueError('its records are larger than the file')
        elif damaged := archive.testzip():  # torch does not verify the checksums
            raise ValueError(f'the checksum of {damaged} is wrong')


@contextlib.contextmanager
def wrap_read_errors(path: Path) -> Iterator[None]:
    """Re-raise read errors as ``CheckpointError``."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f'{path} cannot be opened: {error.strerror or error}.') from error
    except Exception as error:  # damaged bytes make the readers fail in many ways
        reason = ' '.join(str(error).split())
        raise CheckpointError(f'{path} is cut off or damaged ({reason}). Download or copy it again.') from error


@contextlib.contextmanager
def prefix_errors(checkpoint: str) -> Iterator[None]:
    """Begin the message of a ``CheckpointError`` with the name of the checkpoint."""
    try:
        yield
    except CheckpointError as error:
        if checkpoint in str(error):
            raise
        raise CheckpointError(f'{checkpoint}: {error}') from error


class UnknownObject:
    """Placeholder for an object of a class that is not read. Unpickling may do anything to it, without effect."""

    def __new__(cls, *args: Any, **kwargs: Any) -> 'UnknownObject':
        """Accept any arguments."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def _accept(self, *args: Any, **kwargs: Any) -> None:
        pass

    __call__ = __setstate__ = __setitem__ = append = extend = add = _accept


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


# A parameter, or a tensor with attributes, is read as a plain tensor.
SAFE_GLOBALS: dict[str, Any] = {
    'collections.OrderedDict': OrderedDict,
    'torch.Size': torch.Size,
    'torch._utils._rebuild_tensor': _bounded(torch._utils._rebuild_tensor),
    'torch._utils._rebuild_tensor_v2': _bounded(torch._utils._rebuild_tensor_v2),
    'torch._utils._rebuild_parameter': lambda data, *_: data,
    'torch._utils._rebuild_parameter_with_state': lambda data, *_: data,
    'torch._tensor._rebuild_from_type_v2': lambda rebuild, _type, args, _state: rebuild(*args),
    **{f'builtins.{plain.__name__}': plain for plain in (dict, list, tuple, set, frozenset, complex)},
}


_Unpickler: Any = pickle._Unpickler  # the implementation in Python, whose instructions can be overridden


class RestrictedUnpickler(_Unpickler):
    """Unpickler that finds only ``safe_globals``. Names of other objects give :class:`UnknownObject` classes.

    Two instructions are overridden: BUILD could change the classes and functions that a pickle names, and torch would
    allocate as much memory for a storage as the pickle says.

    Attributes:
        safe_globals: Objects that a pickle may use, by their import paths. torch.load adds the storages.
        stored_bytes: Size of each storage in the file by its key, or of the whole file; None does not limit storages.
    """

    safe_globals = SAFE_GLOBALS
    stored_bytes: dict[str, int] | int | None = None

    def find_class(self, module: str, name: str) -> Any:
        """Return the object that a pickle names, or a placeholder."""
        path = f'{module}.{name}'.replace('__builtin__.', 'builtins.')  # as protocol 2 writes it
        if path in self.safe_globals:
            return self.safe_globals[path]
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return self.find_unknown(path)

    def find_unknown(self, path: str) -> Any:
        """Return a placeholder for an object that is not in ``safe_globals``."""
        return type(path, (UnknownObject,), {})

    def load_build(self) -> None:
        """Set the state of an object, but not that of a class or a function."""
        if isinstance(self.stack[-2], type | types.FunctionType | types.BuiltinFunctionType):
            self.stack.pop()
        else:
            super().load_build()

    def load_binpersid(self) -> None:
        """Load a storage, if the file has as many bytes for it as the pickle says."""
        saved_id = self.stack[-1]
        if self.stored_bytes is not None and saved_id[0] == 'storage':
            _, kind, key, _, elements, *_ = saved_id
            needed = elements * kind.dtype.itemsize
            stored = self.stored_bytes.get(key, 0) if isinstance(self.stored_bytes, dict) else self.stored_bytes
            if needed > stored:
                raise ValueError(f'a tensor needs {needed} bytes, but the file stores {stored}')
        super().load_binpersid()

    dispatch = {
        **_Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.BINPERSID[0]: load_binpersid,
    }


def load_restricted(path: Path, unpickler: type[RestrictedUnpickler], **kwargs: Any) -> Any:
    """Call ``torch.load`` with a restricted unpickler.

    Args:
        path: A file whose format :func:`detect_format` has checked.
        unpickler: Reads the pickle.
        **kwargs: Further arguments of ``torch.load``.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    with wrap_read_errors(path):
        stored_bytes: dict[str, int] | int = path.stat().st_size
        with path.open('rb') as file:
            if file.read(2) == b'PK':
                with zipfile.ZipFile(file) as archive:
                    records = [(record.filename.split('/'), record.file_size) for record in archive.infolist()]
                stored_bytes = {parts[-1]: size for parts, size in records if parts[-2:-1] == ['data']}
        bounded: Any = type(unpickler.__name__, (unpickler,), {'stored_bytes': stored_bytes})
        pickle_module = types.SimpleNamespace(
            __name__=unpickler.__name__,
            Unpickler=bounded,
            load=lambda file, **options: bounded(file, **options).load(),
        )
        with warnings.catch_warnings():  # about old pickles
            warnings.simplefilter('ignore')
            return torch.load(str(path), pickle_module=pickle_module, weights_only=False, **kwargs)
