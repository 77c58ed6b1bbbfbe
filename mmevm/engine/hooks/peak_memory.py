"""Memory of a training on CPU."""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmevm.registry import HOOKS

resource = import_module('resource') if find_spec('resource') else None  # None on Windows


@HOOKS.register_module()
class PeakMemoryHook(Hook):
    """Log the peak memory of the process in MB as ``memory``, which mmengine logs on GPUs only.

    Nothing is logged on Windows, where Python has no module ``resource``.
    """

    priority = 'VERY_HIGH'  # before LoggerHook

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Add the peak memory to the message hub."""
        if resource is None:
            return
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # kilobytes on Linux, bytes on macOS
        runner.message_hub.update_scalar('train/memory', peak // 1024 ** (2 if sys.platform == 'darwin' else 1))
