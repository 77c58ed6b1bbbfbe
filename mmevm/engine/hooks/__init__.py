"""Hooks for mmengine's runner."""

from .checkpoint_check import CheckpointCheckHook
from .distillation import DistillationHook, MESAHook
from .peak_memory import PeakMemoryHook
from .preemption import PreemptionHook

__all__ = ['CheckpointCheckHook', 'DistillationHook', 'MESAHook', 'PeakMemoryHook', 'PreemptionHook']
