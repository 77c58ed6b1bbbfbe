"""Measure where the time of a detector's training on a CPU goes, and what each option of mmevm gains.

    python benchmarks/training.py configs/bccd/rtmdet_evm_m1_bccd.py --data-root data/bccd \\
        --json docs/benchmarks/training_bccd.json
    python tools/make_shapes.py data/shapes
    python benchmarks/training.py configs/demo/maskrcnn_evm_m1_shapes.py --data-root data/shapes \\
        --json docs/benchmarks/training_shapes.json

Variants that each lack one option train in turn, one iteration per round, on the same batches. The first table contains
the median milliseconds per iteration and the share of each stage, with all options:

- load: read and decode the images, and make their annotations.
- augment: the other steps of the pipeline.
- preprocess: normalize and stack the images.
- backbone, neck, heads, RoIAlign: their forward passes.
- loss: everything else up to the loss, such as proposals and targets.
- backward of heads (with RoIAlign and the losses), neck and backbone.
- update: the optimizer, and the average of the weights.

The second table contains, for each variant, milliseconds per iteration, images per second, and the median over rounds
of its time relative to all options.
"""

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from mmengine.config import Config, DictAction
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, init_default_scope
from rich.progress import track
from torch import Tensor, nn

from mmevm.analysis.build import build_without_weights
from mmevm.analysis.latency import environment
from mmevm.analysis.latency.timing import enlarge_kernel_cache
from mmevm.cli import read_config, replace_data_root
from mmevm.engine import use_fused_optimizer
from mmevm.mmcv_ops import roi
from mmevm.tables import format_table

WARM_UP = 3  # rounds


class Stopwatch:
    """Adds up the seconds of stages."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Add the time since the last call to a stage."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now


class Training:
    """A model in training.

    Args:
        cfg: Config of a detector.
        setting: Makes a context manager to train in.
    """

    def __init__(self, cfg: Config, setting: Callable[[], AbstractContextManager]) -> None:
        torch.manual_seed(0)
        self.setting = setting
        self.model: Any = build_without_weights(cfg)
        self.model.train()
        self.optim_wrapper = build_optim_wrapper(self.model, cfg.optim_wrapper)
        self.average = None
        for hook in cfg.get('custom_hooks') or []:
            if hook['type'] == 'EMAHook':
                arguments = {key: value for key, value in hook.items() if key not in ('type', 'priority', 'ema_type')}
                self.average = MODELS.build(dict(arguments, type=hook['ema_type'], model=self.model))
        self.watch = Stopwatch()
        for name, module in self.model.named_modules():
            if name in ('backbone', 'neck'):
                self._watch(module, name)
            elif type(module).__name__ == 'RoIAlign':
                self._watch(module, 'RoIAlign')
            elif name.endswith('_head'):
                self._watch(module, 'heads')

    def _watch(self, module: nn.Module, stage: str) -> None:
        module.register_forward_pre_hook(lambda module, inputs: self.watch.lap('loss'))
        module.register_forward_hook(lambda module, inputs, outputs: self._after(stage, outputs))

    def _after(self, stage: str, outputs: Any) -> None:
        self.watch.lap(stage)
        # Autograd calls the first of these hooks after the backward pass of all later modules.
        after = dict(backbone='backward of neck', neck='backward of heads').get(stage)
        if after:
            for output in [output for output in outputs if output.requires_grad]:
                output.register_hook(lambda gradient: self._after_backward(after))

    def _after_backward(self, stage: str) -> None:
        if stage not in self.watch.seconds:
            self.watch.lap(stage)

    def step(self, batch: Any) -> dict[str, float]:
        """Train one iteration, and return the seconds of each stage."""
        batch = copy.deepcopy(batch)
        self.watch = Stopwatch()
        with self.setting():
            data = self.model.data_preprocessor(batch, True)
            self.watch.lap('preprocess')
            loss: Tensor = self.model.parse_losses(self.model(**data, mode='loss'))[0]
            self.watch.lap('loss')
            self.optim_wrapper.backward(loss)
            self.watch.lap('backward of backbone')
            self.optim_wrapper.step()
            self.optim_wrapper.zero_grad()
            if self.average is not None:
                self.average.update_parameters(self.model)
            self.watch.lap('update')
        return self.watch.seconds


def make_batch(dataset: Any, batch_size: int) -> tuple[Any, dict[str, float]]:
    """Return a batch of random images, and the seconds of loading and augmenting them."""
    batch: list = []
    watch = Stopwatch()
    while len(batch) < batch_size:
        sample = dataset.get_data_info(random.randrange(len(dataset)))
        for step in dataset.pipeline.transforms:
            sample = sample and step(sample)  # a step returns None if no object remains
            watch.lap('load' if type(step).__name__.startswith('Load') else 'augment')
        if sample:
            batch.append(sample)
    return pseudo_collate(batch), watch.seconds


def make_trainings(cfg: Config) -> dict[str, Training]:
    """Return the variants of a training."""
    fused = copy.deepcopy(cfg)
    use_fused_optimizer(fused)
    contiguous = copy.deepcopy(fused)
    contiguous.model.backbone.channels_last = False
    settings: dict[str, tuple] = {
        'all options': (fused, nullcontext),
        'without channels_last': (contiguous, nullcontext),
        'without fused optimizer': (cfg, nullcontext),
    }
    if 'roi_head' in cfg.model:
        one_thread = partial(mock.patch.object, roi, '_in_threads', lambda function, x, *args: function(x))
        settings['RoIAlign in one thread'] = (fused, one_thread)
    return {name: Training(*setting) for name, setting in settings.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file of a detector')
    parser.add_argument('--data-root', help='folder of the data')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help='override config values')
    parser.add_argument('--rounds', type=int, default=25)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument('--json', type=Path, help='write all times to this file')
    args = parser.parse_args()

    enlarge_kernel_cache()
    torch.set_num_threads(args.threads)
    random.seed(0)
    cfg = read_config(args.config)
    if args.data_root:
        cfg = replace_data_root(cfg, args.data_root)
    cfg.merge_from_dict(args.cfg_options)
    init_default_scope(cfg.default_scope)
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    batch_size = cfg.train_dataloader.batch_size
    trainings = make_trainings(cfg)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in trainings}
    order = list(trainings)
    for i in track(range(args.rounds + WARM_UP)):
        batch, seconds = make_batch(dataset, batch_size)
        random.shuffle(order)
        for name in order:
            row = seconds | trainings[name].step(batch)
            if i >= WARM_UP:
                results[name].append(row)

    totals = {name: [sum(row.values()) for row in rows] for name, rows in results.items()}
    reference = totals['all options']
    stages, rows = [], results['all options']
    for stage in rows[0]:
        milliseconds = 1e3 * statistics.median(row[stage] for row in rows)
        share = statistics.median(row[stage] / total for row, total in zip(rows, reference, strict=True))
        stages.append((stage, f'{milliseconds:.1f}', f'{share:.0%}'))
    variants = []
    for name, total in totals.items():
        ratio = statistics.median(a / b for a, b in zip(total, reference, strict=True))
        seconds = statistics.median(total)
        variants.append((name, f'{1e3 * seconds:.0f}', f'{batch_size / seconds:.1f}', f'{ratio:.2f}'))
    print(format_table(('stage', 'ms', 'share'), stages))
    print(format_table(('variant', 'ms', 'images/s', 'relative'), variants))
    if args.json:
        arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        parts = dict(arguments=arguments, environment=environment('cpu'), batch_size=batch_size, seconds=results)
        args.json.write_text(json.dumps(parts, indent=1) + '\n')


if __name__ == '__main__':
    main()
