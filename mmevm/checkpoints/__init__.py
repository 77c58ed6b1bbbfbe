"""Read, convert, fetch and load checkpoints.

``read`` turns the bytes of a file into tensors without running code from it, ``fetch`` finds the file (path, URL,
``timm://``), ``convert`` renames and accounts for every tensor, ``load`` puts them into a model.
"""

from mmevm.errors import CheckpointError

from .convert import ConversionReport, convert_checkpoint
from .fetch import fetch_checkpoint
from .load import check_partial, check_strict, load_pretrained, load_strict, load_trained_weights, unwrap_model
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
    'load_trained_weights',
    'prefix_errors',
    'read_checkpoint',
    'unwrap_model',
]
