"""Operators without a deterministic implementation on CUDA, under ``torch.use_deterministic_algorithms(True)``."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def allow_nondeterministic() -> Iterator[None]:
    """Let PyTorch warn of what it would refuse, as ``warn_only=True`` does.

    mmcv's compiled operators add up gradients in any order too, without a word, so a training with
    ``randomness.deterministic=True`` runs with them. PyTorch looks at the mode when a kernel runs: what needs this is
    the backward pass.
    """
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(min(mode, 1))  # 0 allows, 1 warns, 2 refuses
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
