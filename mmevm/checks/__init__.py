"""Checks before a run: warn about likely mistakes and explain the errors that stop it.

Nothing is built or read only to be checked. :func:`check_config` reads the config, :class:`CheckHook` inspects the
datasets and the model that MMEngine's runner has built and traces the first iteration, and :func:`explain_errors`
explains errors of building the run and of its first iteration.

Checks never stop a run that the libraries can train. They raise :class:`mmevm.errors.ConfigError` only if there is
nothing to train on, image files are missing or empty, the pipeline loads masks that objects do not have, label maps
cannot be used, or ``topk`` exceeds the number of classes. Everything else is a warning. A check that fails itself is
skipped.
"""

from .config import check_config
from .explain import explain_errors
from .hook import CheckHook

__all__ = ['CheckHook', 'check_config', 'explain_errors']
