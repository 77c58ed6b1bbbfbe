"""Run operators that have no deterministic implementation under ``torch.use_deterministic_algorithms(True)``."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def allow_nondeterministic() -> Iterator[None]:
    """Warn where PyTorch would raise, as ``warn_only=True`` does.

    mmcv's compiled operators sum gradients in any order without a check, so a training with
    ``randomness.deterministic=True`` runs with them. Only the backward passes need this.
    """
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(min(mode, 1))  # 0 allows, 1 warns, 2 refuses
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
