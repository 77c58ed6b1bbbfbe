"""mmengine's training loops, but an iteration is the same whether the process began with it or long before it.

Random numbers are drawn while a batch is loaded (cropping, flipping) and while it is trained on (sampling of regions,
drop path, mixup). mmengine seeds once, so they depend on all that the process has done since; here they depend on the
seed, the process's rank and the number of the iteration.
"""

import random
import signal
from collections.abc import Iterator
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


class _Batches:
    """Batch after batch of an iterator; what is random in one depends on its number alone."""

    def __init__(self, runner: Runner, batches: Any, number: int, loader: DataLoader) -> None:
        self.runner = runner
        self.batches = batches
        self.number = number
        self.loader = loader

    def __iter__(self) -> '_Batches':
        return self

    def __next__(self) -> Any:
        _set_seed(_seed(self.runner, LOADING, self.number))
        self.number += 1
        return next(self.batches)

    def skip_iter(self, count: int) -> None:
        """Pass over batches that were trained on before, as newer versions of mmengine ask for."""
        self.batches.skip_iter(count)
        self.number += count
        _seed_workers(self.runner, self.loader, self.number)


def _seed_workers(runner: Runner, loader: DataLoader, number: int) -> None:
    """Seed the workers that the loader starts next. A worker's numbers are then one stream until it ends."""
    loader.generator.manual_seed(_seed(runner, WORKERS, number))


def _own_workers(runner: Runner, loader: DataLoader, cfg: dict | DataLoader) -> None:
    """Let torch seed the workers, each by its own number, from a generator that only this loader draws from."""
    loader.generator = torch.Generator()
    _seed_workers(runner, loader, 0)
    if isinstance(cfg, dict) and 'worker_init_fn' not in cfg:
        # In place of mmengine's, which gives a worker the same numbers each time that it is started.
        loader.worker_init_fn = _survive_one_sigterm


def _survive_one_sigterm(worker: int) -> None:
    """A cluster's SIGTERM comes to workers too, whose images the last iterations need. The next one ends them."""
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


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
        own = dict(dataloader, persistent_workers=False) if isinstance(dataloader, dict) else dataloader
        super().__init__(runner, own, *args, **kwargs)
        _own_workers(runner, self.dataloader, dataloader)
        self.trained = 0

    def run_epoch(self) -> None:
        """Iterate over an epoch, or over what is left of it."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        first = self._iter - self.trained
        _seed_workers(self.runner, self.dataloader, first)
        batches = _Batches(self.runner, iter(self.dataloader), first, self.dataloader)
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
        super().__init__(runner, dataloader, *args, **kwargs)
        _own_workers(runner, self.dataloader, dataloader)
        self.dataloader_iterator: Iterator = _Batches(runner, self.dataloader_iterator, 0, self.dataloader)

    def run_iter(self, data_batch: Any) -> None:
        """Train on a batch."""
        _set_seed(_seed(self.runner, TRAINING, self._iter))
        super().run_iter(data_batch)
