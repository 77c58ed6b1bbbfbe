"""Crash-safe, reproducible training.

Checkpoints are written completely or not at all (``atomic_backend``), ``--resume`` continues from the latest valid one
(``resume``, ``training_state``), and the random numbers of an iteration do not depend on the iterations before it
(``loops``). On a CPU, optimizers are fused (``optimizer``).
"""

from .atomic_backend import AtomicBackend
from .loops import ResumableEpochLoop, ResumableIterLoop
from .optimizer import use_fused_optimizer
from .resume import latest_valid_checkpoint, load_from_safely, make_resumable, resume

__all__ = [
    'AtomicBackend',
    'ResumableEpochLoop',
    'ResumableIterLoop',
    'latest_valid_checkpoint',
    'load_from_safely',
    'make_resumable',
    'resume',
    'use_fused_optimizer',
]
