"""The hook that inspects what the runner has built, before the first iteration and during it."""

import sys
from collections.abc import Iterable, Iterator
from textwrap import shorten
from typing import Any

from mmengine.config import Config
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, Runner

from mmevm.checkpoints import strip_scheme, unwrap_model

from .config import iter_dicts, skip_failures, type_name
from .data import DatasetSummary, compare_class_order, summarize_all
from .model import FeatureTracer, check_topk, compare_class_counts

# --check alone inspects larger datasets, because it reads their annotations again.
_MAX_IMAGES = 20_000
_NO_END = 10**9  # default of MMEngine's schedulers is INF, 1e9


class CheckHook(Hook):
    """Warn about data, schedule and model before a run, and trace its first iteration.

    Args:
        check_only: Print a summary after the first iteration and exit with status 0.
    """

    priority = 'HIGHEST'  # exit before other hooks write files

    def __init__(self, check_only: bool = False) -> None:
        self.check_only = check_only
        self.finished = False
        self.tracer: FeatureTracer | None = None
        self.summaries: list[DatasetSummary] = []

    def before_train(self, runner: Runner) -> None:
        """Check datasets, schedule and heads."""
        self._check(runner, 'train', runner.train_dataloader, runner.val_loop and runner.val_dataloader)
        _warn(runner, _schedule(runner))

    def before_test(self, runner: Runner) -> None:
        """Check dataset and heads."""
        self._check(runner, 'test', runner.test_dataloader)

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Trace the first iteration."""
        if not self.finished and not runner.cfg.get('compile'):
            self.tracer = FeatureTracer(unwrap_model(runner), runner.cfg.model).__enter__()

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Warn about the first iteration. Exit if it is the only one."""
        if self.finished:
            return
        self.finished = True
        if self.tracer is not None:
            self.tracer.__exit__()
            _warn(runner, self.tracer.warnings())
        if self.check_only:
            if is_main_process():
                lines = ['', 'Check passed. Summary of the run:', *(f'  {line}' for line in self._summary(runner)), '']
                sys.stdout.write('\n'.join(lines))
            sys.exit(0)

    before_test_iter = before_train_iter
    after_test_iter = after_train_iter
    after_train = after_train_iter  # of a resumed training without iterations left

    def explain(self, error: Exception) -> str | None:
        """Explain an error of the first iteration by its channels; None if they are not the cause."""
        explanation = self.tracer and self.tracer.explain()
        return f'{explanation} ({type(error).__name__}: {shorten(str(error), 200)})' if explanation else None

    def _check(self, runner: Runner, split: str, loader: Any, val_loader: Any = None) -> None:
        datasets = {f'{split}_dataloader.dataset': loader.dataset}
        if val_loader:
            datasets['val_dataloader.dataset'] = val_loader.dataset
        model = unwrap_model(runner)
        with skip_failures():
            check_topk(runner.cfg, model, ['val', 'test'] if split == 'train' else ['test'])
        if not is_main_process():
            return
        large = [key for key in datasets if len(datasets[key]) > _MAX_IMAGES and not self.check_only]
        for key in large:
            runner.logger.info(f'{key} has more than {_MAX_IMAGES:,} images; only --check inspects it.')
        self.summaries = summarize_all({key: dataset for key, dataset in datasets.items() if key not in large})
        for summary in self.summaries:
            runner.logger.info(str(summary))
            _warn(runner, summary.warnings)
        _warn(runner, compare_class_order(self.summaries))
        _warn(runner, compare_class_counts(model, loader.dataset, f'{split}_dataloader.dataset'))

    def _summary(self, runner: Runner) -> Iterator[str]:
        for summary in self.summaries:
            yield str(summary)
            if summary.objects and summary.classes:
                yield f'    per class: {summary.per_class()}'
        if self.tracer is not None:
            if self.tracer.image_size:
                yield 'input: {} × {} pixels (height × width) after the pipeline'.format(*self.tracer.image_size)
            yield from self.tracer.table()
        sizes = [(p.numel(), p.requires_grad) for p in unwrap_model(runner).parameters()]
        trained = sum(size for size, requires_grad in sizes if requires_grad)
        yield f'parameters: {sum(size for size, _ in sizes) / 1e6:.2f} M, of which {trained / 1e6:.2f} M are trained'
        yield f'weights: {"; ".join(_weights(runner.cfg)) or "random"}'
        if isinstance(runner.optim_wrapper, OptimWrapper):
            yield from _training(runner)


def _warn(runner: Runner, messages: Iterable[str]) -> None:
    with skip_failures():
        for message in dict.fromkeys(messages) if is_main_process() else ():
            runner.logger.warning(message)


def _schedulers(runner: Runner) -> Iterator[tuple[str, Any, list[int]]]:
    """Yield the key, the scheduler and the sorted milestones of each parameter scheduler."""
    for i, scheduler in enumerate(runner.param_schedulers if isinstance(runner.param_schedulers, list) else ()):
        yield f'param_scheduler.{i}', scheduler, sorted(getattr(scheduler, 'milestones', ()))


def _schedule(runner: Runner) -> Iterator[str]:
    ends = []  # of schedulers that reduce the learning rate, as parts of the training
    for key, scheduler, milestones in _schedulers(runner):
        unit, total = ('epochs', runner.max_epochs) if scheduler.by_epoch else ('iterations', runner.max_iters)
        name = f'{key} ({type(scheduler).__name__})'
        first = scheduler.begin + (milestones[0] if milestones else 0)
        if first >= total:
            yield f'{name} has no effect before {first} {unit}, but the training has {total}.'
        elif not _is_warmup(scheduler):
            ends.append((milestones[-1] + scheduler.begin if milestones else scheduler.end) / total)
        elif total < scheduler.end < _NO_END:
            yield f'{name} is a warm-up of {scheduler.end} {unit}, but the training has {total}. Reduce {key}.end.'
        elif total / 2 < scheduler.end < _NO_END:
            yield (
                f'{name} is a warm-up of {scheduler.end} {unit}, more than half of the training, which has {total}. '
                f'Reduce {key}.end, or train longer.'
            )
    if ends and max(ends) < 0.5:
        yield (
            f'param_scheduler: the learning rate stays the same after {max(ends):.0%} of the training. If you changed '
            'its length in train_cfg, also scale the milestones or the end of param_scheduler.'
        )


def _is_warmup(scheduler: Any) -> bool:
    start = getattr(scheduler, 'start_factor', getattr(scheduler, 'factor', 1))
    return type(scheduler).__name__.startswith(('LinearLR', 'ConstantLR')) and start < getattr(
        scheduler, 'end_factor', 1
    )


def _weights(cfg: Config) -> Iterator[str]:
    if cfg.get('load_from'):
        yield f'{"resumed from" if cfg.get("resume") else "load_from"} {strip_scheme(str(cfg.load_from))}'
    for key, part in iter_dicts(cfg.model, 'model'):
        if part.get('checkpoint') and type_name(part) == 'Pretrained':
            yield f'{key.removesuffix(".init_cfg")} from {part["checkpoint"]}'


def _training(runner: Runner) -> Iterator[str]:
    loader = runner.train_dataloader
    batch = getattr(loader.batch_sampler, 'batch_size', loader.batch_size)
    by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
    epochs = f' ({runner.max_epochs} epochs of {len(loader)} iterations)' if by_epoch else ''
    yield f'training: {runner.max_iters} iterations of {batch} images per process{epochs}'
    rate = max(group.get('initial_lr', group['lr']) for group in runner.optim_wrapper.param_groups)
    line = f'optimizer: {type(runner.optim_wrapper.optimizer).__name__}, learning rate {rate:g}'
    scaling, total = runner.cfg.get('auto_scale_lr') or {}, batch * get_world_size()
    if not scaling.get('enable') and scaling.get('base_batch_size', total) != total:
        line += f' for batch size {scaling["base_batch_size"]}; --auto-scale-lr scales it to {total}'
    yield line
    for key, scheduler, milestones in _schedulers(runner):
        unit = 'epoch' if scheduler.by_epoch else 'iteration'
        end = 'the end' if scheduler.end >= _NO_END else scheduler.end
        steps = f', milestones {milestones}' if milestones else ''
        yield f'    {key}: {type(scheduler).__name__} from {unit} {scheduler.begin} to {end}{steps}'
