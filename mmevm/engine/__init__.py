"""Crash-safe, reproducible training.

Checkpoints are written completely or not at all (``atomic_backend``), ``--resume`` continues from the latest valid one
(``resume``, ``training_state``), and the random numbers of an iteration do not depend on the iterations before it
(``loops``). Importing this package registers the schemes ``safe://``, ``resume://`` and ``timm://`` of mmengine's
``load_from``.
"""

from .atomic_backend import AtomicBackend
from .loops import ResumableEpochLoop, ResumableIterLoop
from .resume import latest_valid_checkpoint, load_from_safely, make_resumable, resume

__all__ = [
    'AtomicBackend',
    'ResumableEpochLoop',
    'ResumableIterLoop',
    'latest_valid_checkpoint',
    'load_from_safely',
    'make_resumable',
    'resume',
]
