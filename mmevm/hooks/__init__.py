"""Hooks for mmengine's runner."""

from .loading import LoadingHook
from .peak_memory import PeakMemoryHook
from .preemption import PreemptionHook
from .teachers import DistillationHook, MESAHook

__all__ = ['DistillationHook', 'LoadingHook', 'MESAHook', 'PeakMemoryHook', 'PreemptionHook']
