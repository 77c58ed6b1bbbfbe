"""A training that may be killed at any moment, and ends as if it had not been.

Checkpoints are written whole or not at all (``saving``), a training finds the last whole one and goes on from there
(``resuming``), and what is random in an iteration does not depend on what was before it (``loops``).
"""

from .loops import ResumableEpochLoop, ResumableIterLoop
from .resuming import last_whole_checkpoint, make_resumable, resume, start_inertly
from .saving import AtomicBackend

__all__ = [
    'AtomicBackend',
    'ResumableEpochLoop',
    'ResumableIterLoop',
    'last_whole_checkpoint',
    'make_resumable',
    'resume',
    'start_inertly',
]
