"""A cluster that wants its machine back gets it, and the training goes on elsewhere."""

import signal
import sys
from functools import partial
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import all_reduce, get_world_size
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from mmevm.registry import HOOKS
from mmevm.training.loops import ResumableEpochLoop, start_worker


@HOOKS.register_module()
class PreemptionHook(Hook):
    """Saves a checkpoint on SIGTERM, which a cluster sends before it takes a machine away, and ends the process.

    The exit status is 143 (128 + SIGTERM), as of a process that the signal has ended: the training is not complete.
    ``--resume`` goes on with the next iteration, within the epoch too.

    Args:
        interval: Several processes ask each other every so many iterations whether one has got the signal. One process
            alone acts after the iteration.
    """

    priority = 'LOWEST'  # after the schedules, the average and the regular checkpoint

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval
        self.received = False

    def before_run(self, runner: Runner) -> None:
        """Listen to SIGTERM, and let the evaluation's loader outlive it, as the loops of ``mmevm.training`` do."""
        signal.signal(signal.SIGTERM, self._receive)
        if runner.val_loop is not None:
            loader = runner.val_loop.dataloader
            loader.worker_init_fn = partial(start_worker, init=loader.worker_init_fn)

    def after_run(self, runner: Runner) -> None:
        """Listen no longer."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _receive(self, *args: Any) -> None:
        self.received = True

    def after_train_iter(self, runner: Runner, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        """Save and end if it is time."""
        if self._is_time(runner.iter + 1):
            self._save_and_exit(runner, runner.iter + 1, trained=batch_idx + 1)

    def after_val_iter(self, runner: Runner, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        """Save and end if it is time; this evaluation is not done again."""
        if self._is_time(batch_idx + 1):
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):
                    hook.after_val_epoch(runner)  # which takes the average out of the model again
            self._save_and_exit(runner, runner.iter, trained=0)

    def _is_time(self, count: int) -> bool:
        if get_world_size() == 1:
            return self.received
        if count % self.interval:
            return False
        received = torch.tensor(float(self.received), device=get_device())
        all_reduce(received)
        return received.item() > 0

    def _save_and_exit(self, runner: Runner, iteration: int, trained: int) -> None:
        name = f'iter_{iteration}.pth'
        meta = dict(epoch=runner.epoch, iter=iteration)
        loop = runner.train_loop
        if isinstance(loop, EpochBasedTrainLoop):
            name = f'epoch_{runner.epoch}_{name}'
            meta.update(trained=trained, batches_of_epoch=len(loop.dataloader))
        runner.save_checkpoint(
            runner.work_dir, name, meta=meta, by_epoch=False, backend_args=dict(backend='mmevm.atomic')
        )
        runner.logger.warning(
            f'SIGTERM: the training ends after {iteration} of {runner.max_iters} iterations. {name} has been saved; '
            'the same command with --resume goes on from there.'
        )
        sys.exit(128 + signal.SIGTERM)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Find the place within the epoch."""
        meta, loop = checkpoint.get('meta', {}), runner.train_loop
        if not (runner.cfg.get('resume') and meta.get('trained')):
            return
        if isinstance(loop, ResumableEpochLoop) and meta['batches_of_epoch'] == len(loop.dataloader):
            loop.trained = meta['trained']
            runner.logger.info(f'{loop.trained} of {len(loop.dataloader)} batches of this epoch are passed over.')
        else:
            runner.logger.warning(
                f'The training had ended within epoch {meta["epoch"] + 1}, after {meta["trained"]} of '
                f'{meta["batches_of_epoch"]} batches; now an epoch has {len(loop.dataloader)}, or the loop is not '
                "type='mmevm.ResumableEpochLoop': this epoch begins anew."
            )
