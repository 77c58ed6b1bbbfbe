"""Hooks for mmengine's runner."""

from .peak_memory import PeakMemoryHook
from .preemption import PreemptionHook
from .teachers import DistillationHook, MESAHook

__all__ = ['DistillationHook', 'MESAHook', 'PeakMemoryHook', 'PreemptionHook']
