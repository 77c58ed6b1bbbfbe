"""Compare the speed of models on this machine; ``tools/benchmark_latency.py`` is the command line.

``benchmark`` describes how it is measured, ``plots`` draws the results.

Example:
    >>> from mmevm.analysis.latency import Setting, benchmark, table
    >>> results = list(benchmark(['m1', 'efficientvim_m1'], [Setting(resolution=64, batch_size=1)], rounds=2))
    >>> print(table(results, reference='efficientvim_m1'))  # doctest: +SKIP
"""

from .benchmark import Setting, benchmark, build
from .breakdown import Breakdown, break_down
from .engines import DTYPES, ENGINES, prepare
from .model_spec import DEFAULT_MODELS, PARTS, ModelSpec
from .results import Result, environment, read_json, relative_times, table, write_json

__all__ = [
    'DEFAULT_MODELS',
    'DTYPES',
    'ENGINES',
    'PARTS',
    'Breakdown',
    'ModelSpec',
    'Result',
    'Setting',
    'benchmark',
    'break_down',
    'build',
    'environment',
    'prepare',
    'read_json',
    'relative_times',
    'table',
    'write_json',
]
