"""mmengine's training loops, but an iteration is the same whether the process began with it or long before it.

Random numbers are drawn while a batch is loaded (cropping, flipping) and while it is trained on (sampling of regions,
drop path, mixup). mmengine seeds once, so they depend on all that the process has done since; here they depend on the
seed, the process's rank and the number of the iteration.
"""

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from mmevm.registry import LOOPS

LOADING, TRAINING, WORKERS = range(3)


def _seed(runner: Runner, purpose: int, iteration: int) -> int:
    return int(np.random.SeedSequence([runner.seed, get_rank(), purpose, iteration]).generate_state(1)[0])


def _set_seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _survive_one_sigterm() -> None:
    """Let a loader's worker outlive the SIGTERM that a cluster sends to it too; the next one, or its parent's, ends it.

    The last iterations need its images, and the training ends with an error if it is gone. Where the system does not
    say who has sent a signal (macOS, Windows), the worker ends at once.
    """
    if hasattr(signal, 'sigwaitinfo'):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_await_sigterm, daemon=True).start()


def _await_sigterm() -> None:
    for told in (False, True):
        sender = signal.sigwaitinfo([signal.SIGTERM]).si_pid
        if told or sender == os.getppid():
            os._exit(128 + signal.SIGTERM if sender != os.getppid() else 0)  # as PyTorch does for a parent


def init_worker(worker: int, init: Callable[[int], None] | None = None, seed: int | None = None) -> None:
    """What a loader's worker begins with: what was its ``worker_init_fn``, and a seed of its own if there is one."""
    _survive_one_sigterm()
    if seed is not None:
        _set_seed(int(np.random.SeedSequence([seed, worker]).generate_state(1)[0]))
    if init is not None:
        init(worker)


class _Workers:
    """How a loader's workers start: in place of mmengine's seeds, which are the same each time."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.init: Callable[[int], None] | None = None  # a user's

    def own(self, dataloader: dict | DataLoader, **settings: Any) -> dict | DataLoader:
        """Let the loader that is built of a config start workers so from the first."""
        if not isinstance(dataloader, dict):
            return dataloader
        init = dict(type=init_worker, seed=_seed(self.runner, WORKERS, 0))
        return {'worker_init_fn': init} | dataloader | settings

    def seed(self, loader: DataLoader, number: int) -> None:
        """Seed those that the loader starts next. A worker's numbers are then one stream until it ends."""
        start = loader.worker_init_fn
        if not (isinstance(start, partial) and start.func is init_worker):
            self.init = start
        loader.worker_init_fn = partial(init_worker, init=self.init, seed=_seed(self.runner, WORKERS, number))


class _Batches:
    """Batch after batch of an iterator; what is random in one depends on its number alone."""

    def __init__(self, batches: Any, number: int, loader: DataLoader, workers: _Workers) -> None:
        self.batches = batches
        self.number = number
        self.loader = loader
        self.workers = workers

    def __iter__(self) -> '_Batches':
        return self

    def __next__(self) -> Any:
        _set_seed(_seed(self.workers.runner, LOADING, self.number))
        self.number += 1
        return next(self.batches)

    def skip_iter(self, count: int) -> None:
        """Pass over batches that were trained on before, as newer versions of mmengine ask for."""
        self.batches.skip_iter(count)
        self.number += count
        self.workers.seed(self.loader, self.number)


@LOOPS.register_module()
class ResumableEpochLoop(EpochBasedTrainLoop):
    """mmengine's ``EpochBasedTrainLoop`` that may begin within an epoch, and whose iterations repeat.

    Workers start anew in each epoch, even where the config says ``persistent_workers``, because a running worker cannot
    be seeded.

    Attributes:
        trained: How many batches of the epoch that comes next were trained on before. They are read again, and passed
            over.
    """

    def __init__(self, runner: Runner, dataloader: dict | DataLoader, *args: Any, **kwargs: Any) -> None:
        self.workers = _Workers(runner)
        super().__init__(runner, self.workers.own(dataloader, persistent_workers=False), *args, **kwargs)
        self.trained = 0

    def run_epoch(self) -> None:
        """Iterate over an epoch, or over what is left of it."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        first = self._iter - self.trained
        self.workers.seed(self.dataloader, first)
        batches = _Batches(iter(self.dataloader), first, self.dataloader, self.workers)
        for index, batch in enumerate(batches):
            if index >= self.trained:
                self.run_iter(index, batch)
        self.trained = 0
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Train on a batch."""
        _set_seed(_seed(self.runner, TRAINING, self._iter))
        super().run_iter(idx, data_batch)


@LOOPS.register_module()
class ResumableIterLoop(IterBasedTrainLoop):
    """mmengine's ``IterBasedTrainLoop`` whose iterations repeat.

    Where mmengine passes over batches without loading them (0.10.12 does, 0.10.7 does not), workers start from other
    random numbers than they would have had by then: the same images, in the same order, but flipped otherwise.
    """

    def __init__(self, runner: Runner, dataloader: dict | DataLoader, *args: Any, **kwargs: Any) -> None:
        workers = _Workers(runner)
        super().__init__(runner, workers.own(dataloader), *args, **kwargs)  # 0.10.7 starts them here
        workers.seed(self.dataloader, 0)
        # It begins with a draw, wherever that is: within the first iteration, or the first after resuming.
        self.dataloader.generator = torch.Generator()
        self.dataloader_iterator: Iterator = _Batches(self.dataloader_iterator, 0, self.dataloader, workers)

    def run_iter(self, data_batch: Any) -> None:
        """Train on a batch."""
        _set_seed(_seed(self.runner, TRAINING, self._iter))
        super().run_iter(data_batch)
