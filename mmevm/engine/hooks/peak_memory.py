"""The memory of a training without a GPU."""

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
    """Log the peak memory of the process in MB, as ``memory``; mmengine itself logs that of a GPU only.

    Nothing is logged on Windows, which does not have Python's module ``resource``.
    """

    priority = 'VERY_HIGH'  # before what writes the log

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Hand the figure to the message hub, from which the log is written."""
        if resource is None:
            return
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # kilobytes on Linux, bytes on macOS
        runner.message_hub.update_scalar('train/memory', peak // 1024 ** (2 if sys.platform == 'darwin' else 1))
