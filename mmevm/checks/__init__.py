"""Checks before a run: warn about likely mistakes and explain the errors that stop it.

Nothing is built or read only to be checked. :func:`check_config` reads the config, :class:`CheckHook` inspects the
datasets and the model that MMEngine's runner has built, and :func:`explain_errors` explains errors of building them and
of the first iteration. A run is refused only if it cannot work or has nothing to train on; everything else is a
warning. A check skips what it does not recognize.
"""

from .config import check_config
from .explain import explain_errors
from .hook import CheckHook

__all__ = ['CheckHook', 'check_config', 'explain_errors']
