"""FLOPs and latency of backbones, classifiers and detectors."""

from .build import build_without_weights, default_input_size, padded_size
from .complexity import Complexity, measure_complexity

__all__ = ['Complexity', 'build_without_weights', 'default_input_size', 'measure_complexity', 'padded_size']
