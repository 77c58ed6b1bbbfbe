"""Operators without a deterministic implementation under ``torch.use_deterministic_algorithms(True)``."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def allow_nondeterministic() -> Iterator[None]:
    """Warn instead of raising an error, as ``warn_only=True`` does.

    mmcv's compiled operators are not deterministic either and do not check for it, so training with
    ``randomness.deterministic=True`` runs with them. Only the backward passes need this.
    """
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(min(mode, 1))  # 0: allow, 1: warn, 2: raise
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
