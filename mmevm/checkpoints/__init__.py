"""Read, convert, fetch and load checkpoints.

- ``read``: turn the bytes of a file into tensors without running code from it,
- ``state_dict``: find the state dict and compare it with expected shapes,
- ``convert``: rename the tensors of the authors and timm, and account for every tensor,
- ``fetch``: find the file (path, URL, ``timm://``),
- ``load``: load the tensors into a model.
"""

from mmevm.errors import CheckpointError

from .convert import ConversionReport, convert_checkpoint
from .fetch import fetch_checkpoint, strip_scheme
from .load import check_partial, check_strict, load_pretrained, load_strict, unwrap_model
from .read import prefix_errors, read_checkpoint

__all__ = [
    'CheckpointError',
    'ConversionReport',
    'check_partial',
    'check_strict',
    'convert_checkpoint',
    'fetch_checkpoint',
    'load_pretrained',
    'load_strict',
    'prefix_errors',
    'read_checkpoint',
    'strip_scheme',
    'unwrap_model',
]
