"""Save a checkpoint and end when a cluster preempts the job."""

import os
import signal
import sys
import threading
from functools import partial
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import all_reduce, barrier, get_world_size
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from mmevm.engine.loops import ResumableEpochLoop, init_worker
from mmevm.engine.training_state import find_unresumable
from mmevm.registry import HOOKS


@HOOKS.register_module()
class PreemptionHook(Hook):
    """Save a checkpoint on SIGTERM, which a cluster sends before it takes a machine away, and end the process.

    The exit status is 143 (128 + SIGTERM), as for a process that the signal ended. ``--resume`` continues with the next
    iteration, also within an epoch.

    A single process saves after the current iteration. Several processes all-reduce the flag where all of them arrive:
    every ``interval`` training iterations, at the start and the end of an evaluation, and every ``interval`` batches of
    it as long as every process has batches.

    While a checkpoint is saved, a warning names what a resume will refuse.

    Args:
        interval: Number of iterations between two all-reduces of several processes.
    """

    priority = 'LOWEST'  # after the schedules, the average and the regular checkpoint

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval
        self.received = False
        self.previous: Any = None
        self.shared_batches = self.evaluated = 0
        self.warned: set[str] = set()

    def before_run(self, runner: Runner) -> None:
        """Handle SIGTERM, and let the workers of the evaluation's loader survive it, as those of the training do."""
        if threading.current_thread() is not threading.main_thread():
            runner.logger.warning('PreemptionHook is off: Python receives signals in the main thread only.')
            return
        self.previous = signal.signal(signal.SIGTERM, self._receive) or signal.SIG_DFL
        failed = getattr(self.previous, '__self__', None)  # the hook of a run that did not reach after_run
        if isinstance(failed, PreemptionHook):
            self.previous = failed.previous
        if runner.val_loop is not None:
            loader = runner.val_loop.dataloader
            loader.worker_init_fn = partial(init_worker, init=loader.worker_init_fn)

    def after_run(self, runner: Runner) -> None:
        """Restore the previous signal handler."""
        if self.previous is not None:
            signal.signal(signal.SIGTERM, self.previous)
            self.previous = None

    def _receive(self, *args: Any) -> None:
        self.received = True

    def after_train_iter(self, runner: Runner, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        """Save and exit if SIGTERM was received."""
        if self._is_time(runner.iter + 1):
            self._save_and_exit(runner, runner.iter + 1, batches_done=batch_idx + 1)

    def before_val_epoch(self, runner: Runner) -> None:
        """Find the number of batches that every process evaluates; save and exit if SIGTERM was received."""
        try:
            batches = len(runner.val_loop.dataloader)
        except TypeError:  # an iterable dataset or batch sampler without a length
            batches = 0
        least = torch.tensor(float(batches), device=get_device())
        all_reduce(least, 'min')
        self.shared_batches, self.evaluated = int(least.item()), 0
        if self._is_time():
            self._save_and_exit_in_evaluation(runner)

    def after_val_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Save and exit if SIGTERM was received; resuming does not repeat the evaluation."""
        # A process without further batches waits in the evaluator's collective calls. More batches than in the loader
        # are those of MMPretrain's EMAHook, which evaluates a second time with the original weights.
        self.evaluated += 1
        if self.evaluated <= self.shared_batches and self._is_time(self.evaluated):
            self._save_and_exit_in_evaluation(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict | None = None) -> None:
        """Save and exit if SIGTERM was received."""
        if self._is_time():  # EMAHook has restored the original weights
            self._save_and_exit(runner, runner.iter, batches_done=0)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Warn once about each object that a resume will refuse."""
        for problem in find_unresumable(checkpoint):
            if problem not in self.warned:
                self.warned.add(problem)
                runner.logger.warning(problem)

    def _is_time(self, count: int = 0) -> bool:
        if get_world_size() == 1:
            return self.received
        if count % self.interval:
            return False
        received = torch.tensor(float(self.received), device=get_device())
        all_reduce(received)
        return received.item() > 0

    def _save_and_exit_in_evaluation(self, runner: Runner) -> None:
        for hook in runner.hooks:
            # Restore the original weights. MMPretrain's after_val_epoch would evaluate again.
            if isinstance(hook, EMAHook) and getattr(hook, 'evaluate_on_ema', True):
                hook._swap_ema_parameters()
        self._save_and_exit(runner, runner.iter, batches_done=0)

    def _save_and_exit(self, runner: Runner, iteration: int, batches_done: int) -> None:
        name = f'iter_{iteration}.pth'
        meta = dict(epoch=runner.epoch, iter=iteration)
        loop = runner.train_loop
        if isinstance(loop, EpochBasedTrainLoop):
            name = f'epoch_{runner.epoch}_{name}'
            meta.update(trained=batches_done, batches_of_epoch=len(loop.dataloader))
        runner.save_checkpoint(
            runner.work_dir, name, meta=meta, by_epoch=False, backend_args=dict(backend='mmevm.atomic')
        )
        barrier()  # torchrun ends the other processes soon after the first one has ended
        runner.logger.warning(
            f'SIGTERM: the training ends after {iteration} of {runner.max_iters} iterations. Saved {name}; repeat the '
            'command with --resume to continue.'
        )
        sys.exit(128 + signal.SIGTERM)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Skip the batches of the epoch that were trained on before."""
        meta, loop = checkpoint.get('meta', {}), runner.train_loop
        if not (runner.cfg.get('resume') and meta.get('trained')):
            return
        if isinstance(loop, ResumableEpochLoop) and meta['batches_of_epoch'] == len(loop.dataloader):
            loop.batches_done = meta['trained']
            runner.logger.info(f'Skipping {loop.batches_done} of {len(loop.dataloader)} batches of this epoch.')
        else:
            runner.logger.warning(
                f'The checkpoint is from epoch {meta["epoch"] + 1}, after {meta["trained"]} of '
                f'{meta["batches_of_epoch"]} batches, but an epoch now has {len(loop.dataloader)}, or train_cfg.type '
                "is not 'mmevm.ResumableEpochLoop': this epoch restarts."
            )


def _restore_default_handler() -> None:
    if isinstance(getattr(signal.getsignal(signal.SIGTERM), '__self__', None), PreemptionHook):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


# Forked processes must end on SIGTERM: an evaluator's pool sends it to its processes and waits for them. A handler in
# Python does not run in a process that waits for a lock.
if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_restore_default_handler)
