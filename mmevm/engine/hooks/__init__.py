"""Hooks for mmengine's runner."""

from .autocast import AutocastHook
from .checkpoint_check import CheckpointCheckHook
from .distillation import DistillationHook, MESAHook
from .peak_memory import PeakMemoryHook
from .preemption import PreemptionHook

__all__ = [
    'AutocastHook',
    'CheckpointCheckHook',
    'DistillationHook',
    'MESAHook',
    'PeakMemoryHook',
    'PreemptionHook',
]
