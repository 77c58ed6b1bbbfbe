"""Reproducible variants of mmengine's training loops: a resumed training repeats an uninterrupted one.

Random numbers are drawn while a batch is loaded (cropping, flipping) and while it is trained on (sampling of RoIs, drop
path, mixup). mmengine seeds them once per process. These loops seed them in every iteration, from the seed of the
config, the rank of the process and the number of the iteration.
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
    """Ignore the first SIGTERM that does not come from the parent process.

    A cluster sends SIGTERM to the loader's workers too, but the training needs their batches until it has saved a
    checkpoint. Where the system does not tell the sender of a signal (macOS, Windows), the worker ends at once.
    """
    if hasattr(signal, 'sigwaitinfo'):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_await_sigterm, daemon=True).start()


def _await_sigterm() -> None:
    for is_second in (False, True):
        sender = signal.sigwaitinfo([signal.SIGTERM]).si_pid
        if sender == os.getppid():
            os._exit(0)  # as PyTorch's workers do
        if is_second:
            os._exit(128 + signal.SIGTERM)


def init_worker(worker: int, init: Callable[[int], None] | None = None, seed: int | None = None) -> None:
    """Initialize a worker of a data loader.

    Args:
        worker: Index of the worker.
        init: The ``worker_init_fn`` of the config.
        seed: Seed of all workers, combined with the index; None leaves the random numbers as they are.
    """
    _survive_one_sigterm()
    if seed is not None:
        _set_seed(int(np.random.SeedSequence([seed, worker]).generate_state(1)[0]))
    if init is not None:
        init(worker)


class _Workers:
    """Seeds the workers of a data loader. mmengine's seeds are the same in every epoch and after resuming."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.init: Callable[[int], None] | None = None  # the user's worker_init_fn

    def prepare(self, dataloader: dict | DataLoader, **settings: Any) -> dict | DataLoader:
        """Return the config of a data loader with a worker_init_fn and further settings."""
        if not isinstance(dataloader, dict):
            return dataloader
        init = dict(type=init_worker, seed=_seed(self.runner, WORKERS, 0))
        return {'worker_init_fn': init} | dataloader | settings

    def seed(self, loader: DataLoader, number: int) -> None:
        """Seed the workers that the loader starts next. A worker draws from one stream until it ends."""
        start = loader.worker_init_fn
        if not (isinstance(start, partial) and start.func is init_worker):
            self.init = start
        loader.worker_init_fn = partial(init_worker, init=self.init, seed=_seed(self.runner, WORKERS, number))


class _Batches:
    """Iterator of batches that seeds the loading of each batch with its number."""

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
        """Skip batches without loading them, which newer versions of mmengine call."""
        self.batches.skip_iter(count)
        self.number += count
        self.workers.seed(self.loader, self.number)


@LOOPS.register_module()
class ResumableEpochLoop(EpochBasedTrainLoop):
    """Reproducible ``EpochBasedTrainLoop`` that can resume within an epoch.

    The workers of the data loader restart in every epoch, even with ``persistent_workers=True``, because a running
    worker cannot be seeded.

    Attributes:
        batches_done: Number of batches of the next epoch that were trained on before. They are loaded and skipped.
    """

    def __init__(self, runner: Runner, dataloader: dict | DataLoader, *args: Any, **kwargs: Any) -> None:
        self.workers = _Workers(runner)
        super().__init__(runner, self.workers.prepare(dataloader, persistent_workers=False), *args, **kwargs)
        self.batches_done = 0

    def run_epoch(self) -> None:
        """Train on an epoch, or on the rest of it."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        first = self._iter - self.batches_done
        self.workers.seed(self.dataloader, first)
        batches = _Batches(iter(self.dataloader), first, self.dataloader, self.workers)
        for index, batch in enumerate(batches):
            if index >= self.batches_done:
                self.run_iter(index, batch)
        self.batches_done = 0
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Train on a batch."""
        _set_seed(_seed(self.runner, TRAINING, self._iter))
        super().run_iter(idx, data_batch)


@LOOPS.register_module()
class ResumableIterLoop(IterBasedTrainLoop):
    """Reproducible ``IterBasedTrainLoop``.

    Where mmengine skips batches without loading them when it resumes (0.10.12 does, 0.10.7 does not), the loader's
    workers start with other random numbers: the images and their order are the same, but their augmentation is not.
    """

    def __init__(self, runner: Runner, dataloader: dict | DataLoader, *args: Any, **kwargs: Any) -> None:
        workers = _Workers(runner)
        super().__init__(runner, workers.prepare(dataloader), *args, **kwargs)  # 0.10.7 starts them here
        workers.seed(self.dataloader, 0)
        # The iterator draws a number when it starts, which is in the first iteration or the first one after resuming.
        self.dataloader.generator = torch.Generator()
        self.dataloader_iterator: Iterator = _Batches(self.dataloader_iterator, 0, self.dataloader, workers)

    def run_iter(self, data_batch: Any) -> None:
        """Train on a batch."""
        _set_seed(_seed(self.runner, TRAINING, self._iter))
        super().run_iter(data_batch)
