"""The memory of a training without a GPU."""

import resource
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmevm.registry import HOOKS


@HOOKS.register_module()
class PeakMemoryHook(Hook):
    """Logs the peak memory of the process in MB, as ``memory``; mmengine itself logs that of a GPU only."""

    priority = 'VERY_HIGH'  # before what writes the log

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Hand the figure to the message hub, from which the log is written."""
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        runner.message_hub.update_scalar('train/memory', kilobytes // 1024)
