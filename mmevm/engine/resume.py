"""A training goes on from the last checkpoint that is whole, or starts from another's."""

import contextlib
import re
from collections.abc import Iterator
from logging import WARNING
from pathlib import Path
from string import Formatter
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from mmevm.checkpoints import CheckpointError

from .training_state import check_training_checkpoint, read_training_meta, training_globals

LOOPS = {EpochBasedTrainLoop: 'mmevm.ResumableEpochLoop', IterBasedTrainLoop: 'mmevm.ResumableIterLoop'}
ZOOS = ('torchvision://', 'modelzoo://', 'open-mmlab://', 'openmmlab://', 'mmcls://', 'safe://', 'timm://')


def make_resumable(cfg: Config) -> None:
    """Let a config's training survive being killed, in the way that this package's parts describe.

    Loops and hooks of other types than mmengine's own stay as they are.

    Args:
        cfg: A config for mmengine's runner, which is changed.
    """
    train_cfg = cfg.get('train_cfg')
    if train_cfg:
        by_epoch = train_cfg.pop('by_epoch', None)
        if by_epoch is None and ('max_epochs' in train_cfg or 'max_iters' in train_cfg):
            by_epoch = 'max_epochs' in train_cfg
        if by_epoch is not None and not train_cfg.get('type'):
            train_cfg.type = 'EpochBasedTrainLoop' if by_epoch else 'IterBasedTrainLoop'
        for loop, resumable in LOOPS.items():
            if _is_type(train_cfg.get('type'), loop):
                train_cfg.type = resumable
    if not cfg.get('default_hooks'):
        cfg.default_hooks = {}
    if 'checkpoint' not in cfg.default_hooks:
        cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=1)  # as mmengine does
    checkpoint = cfg.default_hooks.checkpoint
    if checkpoint and _is_type(checkpoint.get('type'), CheckpointHook):
        is_remote = '://' in str(checkpoint.get('out_dir') or '')
        if not (is_remote or checkpoint.get('backend_args') or checkpoint.get('file_client_args')):
            checkpoint.backend_args = dict(backend='mmevm.atomic')
    own = [dict(type='mmevm.CheckpointCheckHook'), dict(type='mmevm.PreemptionHook')]
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), *own]


def _is_type(kind: Any, cls: type) -> bool:
    """Whether the ``type`` of a config is a class of MMEngine, given as a class, its name, or its import path."""
    if not isinstance(kind, str):
        return kind is cls
    scope, _, name = kind.rpartition('.')
    return name == cls.__name__ and scope.partition('.')[0] in ('', 'mmengine')


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
        hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
        folders = [Path(cfg.work_dir)]
        if out_dir := hook.get('out_dir'):
            folders.append(Path(out_dir, folders[0].absolute().name))
        found = latest_valid_checkpoint(*folders, filename_tmpl=hook.get('filename_tmpl'))
        if found is None:
            print_log(f'There is nothing in {cfg.work_dir} to resume from: the training starts anew.', level=WARNING)
            cfg.resume = False
            load_from_safely(cfg)
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
        if isinstance(part, dict) and part.get('init_cfg'):
            part['init_cfg'] = None  # pretrained weights would be fetched, and overwritten


def load_from_safely(cfg: Config) -> None:
    """Let a config's ``load_from`` be read by mmevm, which runs nothing that a file brings.

    Names within a model zoo of OpenMMLab's or torchvision's stay mmengine's.

    Args:
        cfg: A config for mmengine's runner, which is changed.
    """
    if cfg.get('load_from') and not cfg.load_from.startswith(ZOOS):
        cfg.load_from = f'safe://{cfg.load_from}'


def latest_valid_checkpoint(*folders: Path, filename_tmpl: str | None = None) -> tuple[Path, dict[str, Any]] | None:
    """Find the latest valid checkpoint of a training: the one after the most iterations, by its own metadata.

    A warning names damaged checkpoints. Other files, the best checkpoints, and weights without a training's state are
    passed over. mmengine's ``last_checkpoint`` is not asked: it may be cut off, or name a file that was damaged since.

    Args:
        folders: Folders of checkpoints.
        filename_tmpl: That of the ``CheckpointHook``, which may begin with a folder.

    Returns:
        Its path and metadata, or None if there is no checkpoint at all.

    Raises:
        CheckpointError: If there are checkpoints, but none is valid.
    """
    found, unreadable, refused = [], [], []
    for path in _checkpoints(folders, filename_tmpl):
        try:
            meta = read_training_meta(path)
        except CheckpointError as error:
            print_log(f'{error} Another checkpoint is tried.', level=WARNING)
            unreadable.append((path, str(error)))
        else:
            if meta:
                # After the same iteration, the one of PreemptionHook knows its place within the epoch ('trained').
                found.append((meta['iter'], meta['epoch'], 'trained' in meta, path))
            else:
                unreadable.append((path, f'{path} holds no state of a training.'))
    for *_, path in sorted(found, reverse=True):
        try:
            return path, check_training_checkpoint(path)
        except CheckpointError as error:
            print_log(f'{error} The checkpoint before it is tried.', level=WARNING)
            refused.append(str(error))
    refused += [problem for path, problem in reversed(unreadable) if _would_be_replaced(path.name, filename_tmpl)]
    if refused:
        raise CheckpointError(
            f'None of the checkpoints in {", ".join(map(str, folders))} can be resumed from; to train from the start, '
            f'remove them. The last one: {refused[0]}'
        )
    return None


def _checkpoints(folders: tuple[Path, ...], filename_tmpl: str | None) -> Iterator[Path]:
    """Files in torch.save's format, and those that have the name of a checkpoint."""
    places = {folder / Path(filename_tmpl or '').parent for folder in folders} | set(folders)
    for folder in sorted(place for place in places if place.is_dir()):
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith('best_') and path.suffix != '.part':
                start = b''
                with contextlib.suppress(OSError), path.open('rb') as file:
                    start = file.read(2)
                if start == b'PK' or _would_be_replaced(path.name, filename_tmpl):
                    yield path


def _would_be_replaced(name: str, filename_tmpl: str | None) -> bool:
    """Whether a training from the start would write a checkpoint of this name."""
    patterns = [r'(epoch_\d+|iter_\d+|epoch_\d+_iter_\d+)\.pth']
    if filename_tmpl:
        parts = Formatter().parse(Path(filename_tmpl).name)
        patterns.append(''.join(re.escape(text) + ('.+' if field is not None else '') for text, field, *_ in parts))
    return any(re.fullmatch(pattern, name) for pattern in patterns)
