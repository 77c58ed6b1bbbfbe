"""Make a training resumable, and resume it from its latest valid checkpoint."""

import contextlib
import re
from collections.abc import Iterator
from logging import WARNING
from pathlib import Path
from string import Formatter
from typing import Any

from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from mmevm.checkpoint_schemes import SCHEMES
from mmevm.checkpoints import CheckpointError, strip_scheme

from .training_state import check_training_checkpoint, read_training_meta

_LOOPS = {EpochBasedTrainLoop: 'mmevm.ResumableEpochLoop', IterBasedTrainLoop: 'mmevm.ResumableIterLoop'}
# mmengine resolves the names of model zoos, and mmevm its own schemes.
_SCHEMES = ('torchvision://', 'modelzoo://', 'open-mmlab://', 'openmmlab://', 'mmcls://', *SCHEMES)


def make_resumable(cfg: Config) -> None:
    """Add resumable loops, atomic checkpoints, and the hooks for SIGTERM and checkpoint checks to a config.

    Only loops and checkpoint hooks of mmengine's own types are replaced.

    Args:
        cfg: A config for mmengine's runner, which is changed in place.
    """
    train_cfg = cfg.get('train_cfg')
    if train_cfg:
        by_epoch = train_cfg.pop('by_epoch', None)
        if by_epoch is None and ('max_epochs' in train_cfg or 'max_iters' in train_cfg):
            by_epoch = 'max_epochs' in train_cfg
        if by_epoch is not None and not train_cfg.get('type'):
            train_cfg.type = 'EpochBasedTrainLoop' if by_epoch else 'IterBasedTrainLoop'
        for loop, resumable in _LOOPS.items():
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
    hooks = [dict(type='mmevm.CheckpointCheckHook'), dict(type='mmevm.PreemptionHook')]
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), *hooks]


def _is_type(kind: Any, cls: type) -> bool:
    """Return whether the ``type`` of a config is this class of MMEngine: the class, its name or its import path."""
    if not isinstance(kind, str):
        return kind is cls
    scope, _, name = kind.rpartition('.')
    return name == cls.__name__ and scope.partition('.')[0] in ('', 'mmengine')


def resume(cfg: Config, checkpoint: str | Path | None = None) -> None:
    """Let a config resume its training from a checkpoint, which is checked before anything is built.

    Args:
        cfg: A config for mmengine's runner, whose ``resume`` and ``load_from`` among others are changed in place.
        checkpoint: A local file. None is the latest valid checkpoint in ``work_dir``; if there is none, the training
            starts from the beginning.

    Raises:
        CheckpointError: If the file is damaged or not a training checkpoint, or if all checkpoints in ``work_dir`` are.
    """
    if checkpoint is None:
        hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
        folders = [Path(cfg.work_dir)]
        if out_dir := hook.get('out_dir'):
            folders.append(Path(out_dir, folders[0].absolute().name))
        found = latest_valid_checkpoint(*folders, filename_tmpl=hook.get('filename_tmpl'))
        if found is None:
            print_log(
                f'--resume: {cfg.work_dir} has no checkpoint, the training starts from the beginning.', level=WARNING
            )
            cfg.resume = False
            load_from_safely(cfg)
            return
        checkpoint, meta = found
    else:
        checkpoint = strip_scheme(str(checkpoint))
        if '://' in checkpoint:
            raise CheckpointError(f'--resume {checkpoint} is not a local file. Download it and give its path.')
        meta = check_training_checkpoint(checkpoint)
    cfg.resume, cfg.load_from = True, f'resume://{checkpoint}'
    # mmengine restores the seed too, but after it has shuffled the data with a new one.
    randomness = cfg.get('randomness') or {}
    if randomness.get('seed') is None:
        cfg.randomness = randomness | {'seed': meta.get('seed')}
    for part in (cfg.model, cfg.model.get('backbone'), cfg.model.get('head')):
        if isinstance(part, dict) and part.get('init_cfg'):
            part['init_cfg'] = None  # do not download pretrained weights, which would be overwritten


def load_from_safely(cfg: Config) -> None:
    """Let mmevm read the ``load_from`` of a config, without running anything from the file.

    Names in a model zoo of OpenMMLab or torchvision do not change.

    Args:
        cfg: A config for mmengine's runner, which is changed in place.
    """
    if cfg.get('load_from') and not cfg.load_from.startswith(_SCHEMES):
        cfg.load_from = f'safe://{cfg.load_from}'


def latest_valid_checkpoint(*folders: Path, filename_tmpl: str | None = None) -> tuple[Path, dict[str, Any]] | None:
    """Find the valid checkpoint with the most iterations, according to its metadata.

    Damaged checkpoints are logged. Best checkpoints, files with weights only and other files are skipped. mmengine's
    ``last_checkpoint`` is not used: it may be cut off, or name a damaged file.

    Args:
        folders: Folders of checkpoints.
        filename_tmpl: Template of the ``CheckpointHook``, which may begin with a folder.

    Returns:
        Path and metadata of the checkpoint, or None if there is no checkpoint.

    Raises:
        CheckpointError: If there are checkpoints, but none is valid.
    """
    found, unreadable, refused = [], [], []
    for path in _checkpoints(folders, filename_tmpl):
        try:
            meta = read_training_meta(path)
        except CheckpointError as error:
            print_log(f'{error} Skipping this checkpoint.', level=WARNING)
            unreadable.append((path, str(error)))
        else:
            if meta:
                # After the same iteration, prefer PreemptionHook's checkpoint, which has the batches done ('trained').
                found.append((meta['iter'], meta['epoch'], 'trained' in meta, path))
            else:
                unreadable.append((path, f'{path} is not a training checkpoint.'))
    for *_, path in sorted(found, reverse=True):
        try:
            return path, check_training_checkpoint(path)
        except CheckpointError as error:
            print_log(f'{error} Trying the checkpoint before it.', level=WARNING)
            refused.append(str(error))
    refused += [problem for path, problem in reversed(unreadable) if _is_checkpoint_name(path.name, filename_tmpl)]
    if refused:
        raise CheckpointError(
            f'None of the checkpoints in {", ".join(map(str, folders))} can be resumed from. To train from the '
            f'beginning, remove them. The latest one: {refused[0]}'
        )
    return None


def _checkpoints(folders: tuple[Path, ...], filename_tmpl: str | None) -> Iterator[Path]:
    """Yield the zip archives, and other files with the name of a checkpoint."""
    places = {folder / Path(filename_tmpl or '').parent for folder in folders} | set(folders)
    for folder in sorted(place for place in places if place.is_dir()):
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith('best_') and path.suffix != '.part':
                start = b''
                with contextlib.suppress(OSError), path.open('rb') as file:
                    start = file.read(2)
                if start == b'PK' or _is_checkpoint_name(path.name, filename_tmpl):
                    yield path


def _is_checkpoint_name(name: str, filename_tmpl: str | None) -> bool:
    """Return whether a training would write a checkpoint of this name."""
    patterns = [r'(epoch_\d+|iter_\d+|epoch_\d+_iter_\d+)\.pth']
    if filename_tmpl:
        parts = Formatter().parse(Path(filename_tmpl).name)
        patterns.append(''.join(re.escape(text) + ('.+' if field is not None else '') for text, field, *_ in parts))
    return any(re.fullmatch(pattern, name) for pattern in patterns)
