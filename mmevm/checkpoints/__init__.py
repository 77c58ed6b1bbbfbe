"""Other people's checkpoints become ours, and nothing is lost in silence.

The bytes of a file are read without running anything (``reading``), wherever it is (``fetching``); names and shapes
become those of mmevm's modules, and each of them is accounted for (``converting``); a model receives all of its
tensors or says what is missing (``loading``).
"""

from .converting import ConversionReport, convert_checkpoint
from .fetching import fetch_checkpoint
from .loading import load_pretrained, load_trained_weights, load_whole_model, pretrained_cfgs
from .reading import CheckpointError, read_checkpoint

__all__ = [
    'CheckpointError',
    'ConversionReport',
    'convert_checkpoint',
    'fetch_checkpoint',
    'load_pretrained',
    'load_trained_weights',
    'load_whole_model',
    'pretrained_cfgs',
    'read_checkpoint',
]
