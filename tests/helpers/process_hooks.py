"""Hooks for trainings in several processes: faults of one process, and checksums of the weights of each."""

import hashlib
import os
import signal
import time
from pathlib import Path

import psutil
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class FaultHook(Hook):
    """Cause a fault in one process before an iteration, an evaluation or a batch of it."""

    def __init__(self, fault=None, rank=1, at=8, evaluating=False, batch=None):
        self.fault, self.rank, self.at, self.evaluating, self.batch = fault, rank, at, evaluating, batch

    def before_train_iter(self, runner, *args, **kwargs):
        if not self.evaluating and runner.iter == self.at:
            self.cause_fault(runner)

    def before_val(self, runner):
        if self.evaluating and self.batch is None:
            self.cause_fault(runner)

    def before_val_iter(self, runner, batch_idx, *args, **kwargs):
        if self.evaluating and self.batch == batch_idx:
            self.cause_fault(runner)

    def cause_fault(self, runner):
        if self.fault is None or get_rank() != self.rank:
            return
        Path(runner.work_dir, 'fault_time').write_text(str(time.time()))
        if self.fault == 'error':
            raise ValueError('the fault of this test')
        if self.fault == 'exit':
            os._exit(77)
        if self.fault == 'killed':
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == 'all_killed':
            torchrun = psutil.Process(os.getppid())
            others = [process for process in torchrun.children() if process.pid != os.getpid()]
            for process in [torchrun, *others, psutil.Process()]:
                process.kill()
        if self.fault == 'terminated':
            os.kill(os.getppid(), signal.SIGTERM)  # torchrun
            time.sleep(2)


@HOOKS.register_module()
class WeightsHook(Hook):
    """Write a checksum of each process's weights after the training."""

    def after_train(self, runner):
        digest = hashlib.sha256()
        for parameter in runner.model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        Path(runner.work_dir, f'weights_of_{get_rank()}').write_text(digest.hexdigest())
