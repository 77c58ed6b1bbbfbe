"""How fast models are, on the machine at hand: mmevm's beside others, in turns.

``tools/benchmark_latency.py`` is its command line; ``measuring`` says how it is measured. The
pictures are in ``plots``.

Example:
    >>> from mmevm.analysis.latency import benchmark, table
    >>> results = list(benchmark(['m4', 'efficientvim_m4'], [512], batch_sizes=[1], rounds=10))  # doctest: +SKIP
    >>> print(table(results, reference='efficientvim_m4'))  # doctest: +SKIP
"""

from .benchmark import benchmark
from .breakdown import Breakdown, break_down
from .engines import DTYPES, ENGINES, EngineError, prepare
from .model_spec import DEFAULT_MODELS, PARTS, ModelSpec
from .results import Result, environment, read_json, relative_times, table, write_json

__all__ = [
    'DEFAULT_MODELS',
    'DTYPES',
    'ENGINES',
    'PARTS',
    'Breakdown',
    'EngineError',
    'ModelSpec',
    'Result',
    'benchmark',
    'break_down',
    'environment',
    'prepare',
    'read_json',
    'relative_times',
    'table',
    'write_json',
]
