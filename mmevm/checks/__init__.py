"""Checks around a run: warn about likely mistakes, and explain the errors that stop it.

Nothing is built or read only to be checked. :func:`check_config` reads the config; :class:`CheckHook` looks at the data
sets and the model that MMEngine's runner has built; :func:`explain_errors` turns the errors of building them, and of
the first iteration, into one line. A run is refused only if it cannot work or would train on nothing. Everything else
is a warning, and what a check does not understand it skips.
"""

from .config import check_config
from .explain import explain_errors
from .hook import CheckHook

__all__ = ['CheckHook', 'check_config', 'explain_errors']
