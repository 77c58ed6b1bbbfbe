"""Compare the speed of models on this machine; ``tools/benchmark_latency.py`` is the command line.

``benchmark`` describes how it is measured, ``plots`` draws the results.

Example:
    >>> from mmevm.analysis.latency import benchmark, table
    >>> results = list(benchmark(['m4', 'efficientvim_m4'], [512], batch_sizes=[1], rounds=10))  # doctest: +SKIP
    >>> print(table(results, reference='efficientvim_m4'))  # doctest: +SKIP
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
