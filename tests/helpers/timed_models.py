"""Models with known durations and allocations. Other processes must be able to import them."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from mmevm.analysis.latency import ModelSpec

MB = 10**6


@dataclass(frozen=True)
class CustomSpec(ModelSpec):
    """Any module under any name, without deploy mode."""

    module: Callable[[], nn.Module] = nn.Identity

    def __post_init__(self):
        pass

    def build(self):
        return self.module()

    def deploy(self, model):
        return model


class Does(nn.Module):
    """A model with one parameter that calls a function with its input."""

    def __init__(self, action):
        super().__init__()
        self.action = action
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        self.action(x)
        return x * self.weight


class Sleep(Does):
    def __init__(self, seconds):
        super().__init__(lambda x: time.sleep(seconds))


class Takes200MB(nn.Module):
    """A weight of 100 MB and an output of 100 MB."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(100 * MB // 4))

    def forward(self, x):
        return self.weight + 1


def allocate(first, later):
    """Return a function that allocates these bytes in its first and second call."""
    sizes = iter([first, later])
    return lambda: torch.ones(next(sizes) // 4).sum()


def kill_this_process():
    os.kill(os.getpid(), signal.SIGKILL)
