"""Activation checkpointing that updates the running statistics of BatchNorm once per step."""

import contextlib
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


# torch.compile cannot trace context_fn. Without it, torch 2.3 fails at BatchNorm's running statistics, as does the
# 'eager' backend of torch 2.14.
@torch.compiler.disable
def recompute(module: nn.Module, x: Tensor) -> Any:
    """Call ``module(x)``, and call it again in the backward pass instead of keeping its activations.

    The gradients and running statistics are those of ``module(x)``.
    """
    return checkpoint(module, x, use_reentrant=False, context_fn=partial(_contexts, module))


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the forward pass and of its repetition in the backward pass."""
    return contextlib.nullcontext(), _KeepRunningStats(module)


class _KeepRunningStats(AbstractContextManager):
    """Let BatchNorm update copies of its running statistics, which are dropped on exit.

    It can be entered several times: each backward pass through a retained graph recomputes.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]

    def __enter__(self) -> None:
        self.kept = [m._buffers for m in self.norms]
        for m in self.norms:
            m._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in m._buffers.items()}

    def __exit__(self, *error: object) -> None:
        for m, buffers in zip(self.norms, self.kept, strict=True):
            m._buffers = buffers
