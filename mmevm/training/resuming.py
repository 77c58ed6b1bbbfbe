"""A training goes on from the last checkpoint that is whole, or starts from another's."""

import re
from logging import WARNING
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log

from mmevm.checkpoints import CheckpointError, check_training_checkpoint, training_globals

LOOPS = {'EpochBasedTrainLoop': 'mmevm.ResumableEpochLoop', 'IterBasedTrainLoop': 'mmevm.ResumableIterLoop'}
ZOOS = ('torchvision://', 'modelzoo://', 'open-mmlab://', 'openmmlab://', 'mmcls://', 'mmevm://', 'timm://')


def make_resumable(cfg: Config) -> None:
    """Let a config's training survive being killed, in the way that this package's parts describe.

    Loops and hooks of other types than mmengine's own stay as they are.

    Args:
        cfg: A config for mmengine's runner, which is changed.
    """
    train_cfg = cfg.train_cfg
    by_epoch = train_cfg.pop('by_epoch', None)
    if by_epoch is not None:
        train_cfg.setdefault('type', 'EpochBasedTrainLoop' if by_epoch else 'IterBasedTrainLoop')
    train_cfg.type = LOOPS.get(train_cfg.type, train_cfg.type)
    cfg.default_hooks = {'checkpoint': dict(type='CheckpointHook')} | (cfg.get('default_hooks') or {})
    checkpoint = cfg.default_hooks.checkpoint
    if checkpoint and checkpoint.type == 'CheckpointHook' and '://' not in (checkpoint.get('out_dir') or ''):
        checkpoint.setdefault('backend_args', dict(backend='mmevm.atomic'))
    own = [dict(type='mmevm.LoadingHook'), dict(type='mmevm.PreemptionHook')]
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), *own]


def resume(cfg: Config, checkpoint: str | Path | None = None) -> None:
    """Let a config's training go on from a checkpoint, which is looked at before anything is built.

    Args:
        cfg: A config for mmengine's runner, which is changed: its ``resume`` and ``load_from`` among others.
        checkpoint: A local file; None is the last whole one that the config's training has left or, if there is none,
            a training from the start.

    Raises:
        CheckpointError: If the file is not that of a training, or damaged; of those that were left, if all are.
    """
    if checkpoint is None:
        folders = [Path(cfg.work_dir)]
        if out_dir := ((cfg.get('default_hooks') or {}).get('checkpoint') or {}).get('out_dir'):
            folders.append(Path(out_dir, folders[0].name))
        found = last_whole_checkpoint(*folders)
        if found is None:
            print_log(f'There is nothing in {cfg.work_dir} to resume from: the training starts anew.', level=WARNING)
            cfg.resume = False
            start_inertly(cfg)
            return
        path, meta = found
        checkpoint = path
    elif '://' in str(checkpoint):
        raise CheckpointError(f'{checkpoint}: a training is resumed from a local file. Fetch it first.')
    else:
        meta = check_training_checkpoint(checkpoint)
    if hasattr(torch.serialization, 'add_safe_globals'):  # OpenMMLab's mmengine leaves it to torch what may be read
        torch.serialization.add_safe_globals(training_globals())
    cfg.resume, cfg.load_from = True, str(checkpoint)
    # mmengine takes the seed over too, but after it has shuffled the data by a new one.
    randomness = cfg.get('randomness') or {}
    if randomness.get('seed') is None:
        cfg.randomness = randomness | {'seed': meta.get('seed')}
    for part in (cfg.model, cfg.model.get('backbone'), cfg.model.get('head')):
        if part and part.get('init_cfg'):
            part.init_cfg = None  # pretrained weights would be fetched, and overwritten


def start_inertly(cfg: Config) -> None:
    """Let a config's ``load_from`` be read by mmevm, which runs nothing that a file brings.

    Names within a model zoo of OpenMMLab's or torchvision's stay mmengine's.

    Args:
        cfg: A config for mmengine's runner, which is changed.
    """
    if cfg.get('load_from') and not cfg.load_from.startswith(ZOOS):
        cfg.load_from = f'mmevm://{cfg.load_from}'


def last_whole_checkpoint(*folders: Path) -> tuple[Path, dict[str, Any]] | None:
    """The last checkpoint of a training that can be resumed; a warning names the later ones that cannot.

    mmengine's ``last_checkpoint`` is not asked: it may be cut off, or name a file that was damaged since.

    Args:
        folders: Where checkpoints are, of names such as ``epoch_3.pth`` or ``iter_500.pth``.

    Returns:
        Its path and meta data, or None if there is no checkpoint at all.

    Raises:
        CheckpointError: If there are checkpoints, but none is whole.
    """
    paths = [path for folder in folders for path in folder.glob('*.pth') if re.fullmatch(r'(?!best_).*_\d+', path.stem)]
    problems = []
    for path in sorted(paths, key=_progress, reverse=True):
        try:
            return path, check_training_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
            print_log(f'{error} The checkpoint before it is tried.', level=WARNING)
    if problems:
        raise CheckpointError(
            f'None of the checkpoints in {", ".join(map(str, folders))} can be resumed from; to train from the start, '
            f'remove them. The last one: {problems[0]}'
        )
    return None


def _progress(path: Path) -> tuple[int, ...]:
    """epoch_2 < epoch_2_iter_50, of a training that ended within its third epoch, < epoch_3."""
    return tuple(map(int, re.findall(r'\d+', path.stem)))
