"""A training that may be killed at any moment, and ends as if it had not been.

Checkpoints are written whole or not at all (``saving``), a training finds the last whole one and goes on from there
(``resuming``), and what is random in an iteration does not depend on what was before it (``loops``).
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
