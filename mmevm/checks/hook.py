"""The hook that looks at what the runner has built, before the first iteration, and at the model during it."""

import sys
from collections.abc import Iterator
from textwrap import shorten
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, Runner

from mmevm.checkpoints import strip_scheme, unwrap_model

from .config import iter_dicts, type_name
from .data import DatasetSummary, different_classes, leaf_datasets, summarize_all
from .model import FeatureTracer, check_topk, compare_class_counts

# Larger data sets are read by --check only: their annotations would be read twice.
_MAX_IMAGES = 20_000


class CheckHook(Hook):
    """Warn about data, schedule and model before a run, and watch its first iteration.

    Args:
        check_only: Print a summary after the first batch has passed through the model, and exit with status 0.
    """

    priority = 'VERY_LOW'

    def __init__(self, check_only: bool = False) -> None:
        self.check_only = check_only
        self.finished = False
        self.tracer: FeatureTracer | None = None
        self.error: TypeError | None = None

    def before_train(self, runner: Runner) -> None:
        """Look at the data sets, the schedule and the heads."""
        self._check(runner, 'train', runner.train_dataloader, runner.val_loop and runner.val_dataloader)

    def before_test(self, runner: Runner) -> None:
        """Look at the data set."""
        self._check(runner, 'test', runner.test_dataloader)

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Watch the first iteration."""
        if not self.finished and self.tracer is None and not runner.cfg.get('compile'):
            self.tracer = FeatureTracer(unwrap_model(runner), runner.cfg.model).__enter__()

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Warn about what the first iteration has shown."""
        if not self.finished:
            self._finish(runner)

    def before_test_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Watch the first iteration."""
        self.before_train_iter(runner)

    def after_test_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Warn about what the first iteration has shown."""
        self.after_train_iter(runner)

    def explain(self, error: Exception) -> str | None:
        """Explain why the first iteration failed by the channels that met; None if they are not the cause."""
        explanation = self.tracer and self.tracer.explain(error)
        return f'{explanation} ({type(error).__name__}: {shorten(str(error), 200)})' if explanation else None

    def _finish(self, runner: Runner) -> None:
        self.finished = True
        if self.tracer is not None:
            self.tracer.__exit__()
            _warn(runner, self.tracer.warnings())

    def _check(self, runner: Runner, split: str, loader: Any, val_loader: Any = None) -> None:
        datasets = {f'{split}_dataloader.dataset': loader.dataset}
        if val_loader:
            datasets['val_dataloader.dataset'] = val_loader.dataset
        model, summaries = unwrap_model(runner), []
        check_topk(runner.cfg, model, ['val', 'test'] if split == 'train' else ['test'])
        if is_main_process():
            summaries = summarize_all(datasets, None if self.check_only else _MAX_IMAGES)
            for key, dataset in datasets.items():
                if not self.check_only and any(len(leaf) > _MAX_IMAGES for _, leaf in leaf_datasets(dataset, key)):
                    runner.logger.info(f'{key} has more than {_MAX_IMAGES:,} images: only --check looks at them.')
            for summary in summaries:
                _warn(runner, summary.warnings)
                if not self.check_only and summary.key.startswith('train'):
                    runner.logger.info(str(summary))
            _warn(runner, different_classes(summaries))
            _warn(runner, compare_class_counts(model, loader.dataset, f'{split}_dataloader.dataset'))
            if split == 'train':
                _warn(runner, _schedule(runner))
        if self.check_only:
            try:
                self._try_batch(runner, split, loader)
            except TypeError as error:  # MMEngine hides where those within hooks come from
                self.error = error
                raise
            if is_main_process():
                _print_summary(runner, split, summaries, self.tracer)
            sys.exit(0)

    def _try_batch(self, runner: Runner, split: str, loader: Any) -> None:
        """Pass the first batch through the model, without a gradient."""
        batch = next(iter(loader))
        model: Any = unwrap_model(runner)
        with torch.no_grad(), FeatureTracer(model, runner.cfg.model) as self.tracer:
            if split == 'train':
                model.train()
                data = model.data_preprocessor(batch, True)
                model(**data, mode='loss') if isinstance(data, dict) else model(*data, mode='loss')
            else:
                model.eval()
                model.test_step(batch)
        _warn(runner, self.tracer.warnings())


def _warn(runner: Runner, messages: Any) -> None:
    if is_main_process():
        for message in dict.fromkeys(messages):
            runner.logger.warning(message)


def _schedule(runner: Runner) -> Iterator[str]:
    schedulers = runner.param_schedulers
    if not isinstance(schedulers, list):
        return
    for i, scheduler in enumerate(schedulers):
        unit, total = ('epochs', runner.max_epochs) if scheduler.by_epoch else ('iterations', runner.max_iters)
        key = f'param_scheduler.{i} ({type(scheduler).__name__})'
        milestones = sorted(getattr(scheduler, 'milestones', ()))
        if scheduler.begin >= total:
            yield f'{key} begins at {scheduler.begin} of {total} {unit}: it never starts.'
        elif type(scheduler).__name__.startswith(('LinearLR', 'ConstantLR')) and total < scheduler.end < 10**9:
            yield (
                f'{key} is a warm-up of {scheduler.end} {unit}, but the training ends after {total}: the learning rate '
                f'is never reached. Set param_scheduler.{i}.end to a tenth of the training or less.'
            )
        elif milestones and milestones[0] + scheduler.begin >= total:
            yield (
                f'{key} has its first milestone at {milestones[0]} of {total} {unit}: the learning rate is never '
                'lowered.'
            )


def _weights(cfg: Config) -> Iterator[str]:
    if cfg.get('load_from'):
        yield f'{"resumed from" if cfg.get("resume") else "load_from"} {strip_scheme(str(cfg.load_from))}'
    for key, part in iter_dicts(cfg.model, 'model'):
        if part.get('checkpoint') and type_name(part) == 'Pretrained':
            yield f'{key.removesuffix(".init_cfg")} from {part["checkpoint"]}'


def _optimizer(runner: Runner, batch: int) -> Iterator[str]:
    if isinstance(runner.optim_wrapper, OptimWrapper):
        rates = [group.get('initial_lr', group['lr']) for group in runner.optim_wrapper.param_groups]
        rate = f'{max(rates):g}' + (f' (of some parameters down to {min(rates):g})' if min(rates) < max(rates) else '')
        line = f'optimizer: {type(runner.optim_wrapper.optimizer).__name__}, learning rate {rate}'
        scaling, batch = runner.cfg.get('auto_scale_lr') or {}, batch * get_world_size()
        if not scaling.get('enable') and scaling.get('base_batch_size', batch) != batch:
            line += f' for a batch of {scaling["base_batch_size"]} by auto_scale_lr; --auto-scale-lr makes it {batch}'
        yield line


def _print_summary(runner: Runner, split: str, summaries: list[DatasetSummary], tracer: FeatureTracer | None) -> None:
    lines = []
    for summary in summaries:
        lines.append(str(summary))
        if summary.objects and summary.classes:
            lines.append(f'    per class: {summary.per_class()}')
    if tracer is not None:
        if tracer.image_size:
            lines.append('input: {} × {} pixels (height × width) after the pipeline'.format(*tracer.image_size))
        lines += tracer.table()
    model = unwrap_model(runner)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    lines.append(f'parameters: {total / 1e6:.2f} M, of which {trained / 1e6:.2f} M are trained')
    lines.append(f'weights: {"; ".join(_weights(runner.cfg)) or "random"}')
    if split == 'train':
        loader = runner.train_dataloader
        batch = getattr(loader.batch_sampler, 'batch_size', loader.batch_size)
        by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
        lines.append(
            f'training: {runner.max_iters} iterations of {batch} images per process'
            + (f' ({runner.max_epochs} epochs of {len(loader)} iterations)' if by_epoch else '')
        )
        lines += _optimizer(runner, batch)
        for i, scheduler in enumerate(runner.param_schedulers if isinstance(runner.param_schedulers, list) else ()):
            unit = 'epoch' if scheduler.by_epoch else 'iteration'
            end = 'the end' if scheduler.end >= 10**9 else scheduler.end
            milestones = sorted(getattr(scheduler, 'milestones', ()))
            lines.append(
                f'    param_scheduler.{i}: {type(scheduler).__name__} from {unit} {scheduler.begin} to {end}'
                + (f', milestones {milestones}' if milestones else '')
            )
    sys.stdout.write('\n'.join(['', 'Check passed. This is what would run:', *(f'  {line}' for line in lines), '']))
