"""Trainings of a tiny model by mmengine's runner that record the inputs and random numbers of each iteration."""

import multiprocessing
import os
import random
import subprocess
import time

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, LOOPS, METRICS, MODELS
from mmengine.runner import EpochBasedTrainLoop, Runner, set_random_seed

from mmevm.engine import make_resumable, resume

LENGTH, BATCH = 12, 2
PER_EPOCH = LENGTH // BATCH
EPOCHS = 3


@DATASETS.register_module()
class Augmented(torch.utils.data.Dataset):
    """Image numbers, each with one number from each random generator that augmentations use."""

    def __init__(self, length=LENGTH):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)


@MODELS.register_module()
class Recorder(BaseModel):
    """Model with a random loss that sends SIGTERM to its process in an iteration or evaluation."""

    terminated = set()

    def __init__(self, at=None, evaluating=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.calls = {'loss': 0, 'predict': 0}
        self.at, self.signaled = at, 'predict' if evaluating else 'loss'
        self.seen = []

    def forward(self, *inputs, mode):
        self.calls[mode] += 1
        if mode == self.signaled and self.calls[mode] == self.at:
            workers = set(multiprocessing.active_children()) - self.terminated
            self.terminated.update(workers)  # those of an earlier test may still run
            # A cluster sends it to all processes of a job. A worker ends on its parent's, so another process sends it.
            subprocess.run(['kill', '-TERM', *(str(process.pid) for process in workers), str(os.getpid())], check=True)
            time.sleep(0.1)  # the training notices the end of a worker in this time
        if mode == 'predict':
            return list(inputs)
        drawn = [torch.rand(()).item(), np.random.rand(), random.random()]
        self.seen.append((torch.stack(inputs).tolist(), drawn))
        return dict(loss=self.weight * sum(drawn))


@LOOPS.register_module()
class CustomLoop(EpochBasedTrainLoop):
    """Loop of a user, which mmevm does not replace."""


@METRICS.register_module()
class Nothing(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(nothing=0)


def runner(work_dir, by_epoch=True, workers=0, checkpoint=None, options=None, **model):
    """Return a runner of three epochs (or as many iterations) of six batches of two."""
    loader = dict(
        batch_size=BATCH,
        num_workers=workers,
        persistent_workers=workers > 0,
        sampler=dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler', shuffle=True),
        dataset=dict(type='Augmented'),
    )
    iters = dict(type='IterBasedTrainLoop', max_iters=EPOCHS * PER_EPOCH)
    cfg = Config(
        dict(
            model=dict(type='Recorder', **model),
            train_dataloader=loader,
            train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=EPOCHS) if by_epoch else iters,
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=by_epoch)),
            randomness=dict(seed=0),
            work_dir=str(work_dir),
            experiment_name=f'{work_dir}{checkpoint}',
            log_level='WARNING',
        )
    )
    cfg.merge_from_dict(options or {})
    make_resumable(cfg)
    if checkpoint:
        resume(cfg, checkpoint)
    return Runner.from_cfg(cfg)


def train(*args, **kwargs):
    """Train, and return what each iteration has recorded."""
    run = runner(*args, **kwargs)
    set_random_seed(len(kwargs))  # earlier random numbers of the process must not matter
    run.train()
    return run.model.seen
