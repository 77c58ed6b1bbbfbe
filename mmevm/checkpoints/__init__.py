"""Other people's checkpoints become ours, and nothing is lost in silence.

The bytes of a file are read without running anything (``reading``), wherever it is (``fetching``); names and shapes
become those of mmevm's modules, and each of them is accounted for (``converting``); a model receives all of its
tensors or says what is missing (``loading``). A training's own checkpoint is looked at before mmengine resumes from it
(``resumable``).
"""

from .converting import ConversionReport, convert_checkpoint
from .fetching import fetch_checkpoint
from .loading import (
    check_start,
    check_whole,
    load_pretrained,
    load_trained_weights,
    load_whole_model,
    model_of,
    pretrained_cfgs,
)
from .reading import CheckpointError, file_named, read_checkpoint
from .resumable import check_training_checkpoint, find_unresumable, read_training_meta, training_globals

__all__ = [
    'CheckpointError',
    'ConversionReport',
    'check_start',
    'check_training_checkpoint',
    'check_whole',
    'convert_checkpoint',
    'fetch_checkpoint',
    'file_named',
    'find_unresumable',
    'load_pretrained',
    'load_trained_weights',
    'load_whole_model',
    'model_of',
    'pretrained_cfgs',
    'read_checkpoint',
    'read_training_meta',
    'training_globals',
]
