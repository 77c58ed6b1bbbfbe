"""What the command lines under tools/ share: common arguments, and how a config file becomes the config of a run."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mmengine.logging
import torch.distributed
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.dist import all_gather_object
from mmengine.hub import get_config
from mmengine.runner import Runner

from .errors import ExplainedError
from .preflight import ConfigError


def run(main: Callable[[], None]) -> None:
    """Run a command line; of an error that its sentence explains, print the sentence alone and exit with 1."""
    if torch.distributed.is_torchelastic_launched():
        from torch.distributed.elastic.multiprocessing.errors import record

        main = record(main)  # torchrun's last words are then the error of the process that failed first
    try:
        with _without_onedl_notice():
            main()
    except ExplainedError as error:
        sys.exit(f'{type(error).__name__}: {error}')


@contextmanager
def _without_onedl_notice() -> Iterator[None]:
    """Leave out what onedl's mmdet and mmpretrain print on import: that the unrelated package onedl is not installed.

    It has the level DEBUG but names no logger, and mmengine prints that whatever the level.
    """
    print_log = mmengine.logging.print_log

    def print_all_else(msg: Any, *args: Any, **kwargs: Any) -> None:
        if not str(msg).startswith('Could not import OneDL'):
            print_log(msg, *args, **kwargs)

    mmengine.logging.print_log = print_all_else
    try:
        yield
    finally:
        mmengine.logging.print_log = print_log


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that training and testing have in common, named as in MMDetection."""
    parser.add_argument('--work-dir', help='where logs and checkpoints go (default: work_dirs/NAME_OF_CONFIG)')
    parser.add_argument('--data-root', help="where the data is, in place of the config's data_root")
    parser.add_argument(
        '--tensorboard', action='store_true', help='write scalars and pictures for TensorBoard too, below the work dir'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override entries of the config: key=value, nested keys with dots, lists as key="[a,b]"',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what started the processes: torchrun is pytorch',
    )
    # torch.distributed.launch gives it as an argument, torchrun in the environment.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def read_config(path: str) -> Config:
    """Read a config file, or one within a package such as ``mmdet::retinanet/….py``.

    Raises:
        ConfigError: If there is no such file or package, or if the file is not one of a config.
    """
    try:
        return get_config(path) if '::' in path else Config.fromfile(path)
    # mmengine asserts that it knows a package, and has a TypeError for a dict over a base's string without _delete_.
    except (AssertionError, ImportError, OSError, TypeError, ValueError) as error:
        raise ConfigError(
            f'{path} cannot be read ({error}): give the path of a config file or, of an installed package, something '
            'like mmdet::retinanet/retinanet_r50_fpn_1x_coco.py.'
        ) from error


def load_config(args: argparse.Namespace) -> Config:
    """Read ``args.config`` and apply the common arguments to it.

    Args:
        args: What a parser with :func:`add_common_arguments` and an argument ``config`` has parsed.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args.config)
    if args.data_root:
        cfg = replace_data_root(cfg, args.data_root)
    cfg.launcher = args.launcher
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    if cfg.get('default_scope') == 'mmpretrain':
        _set_loader_defaults(cfg)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs', Path(args.config).stem))
    for key in ('val_evaluator', 'test_evaluator'):
        if 'FasterCocoMetric' in str(cfg.get(key)) and find_spec('faster_coco_eval') is None:
            raise ConfigError(
                f'{key} uses FasterCocoMetric, which needs a package that is not installed: pip install '
                'faster-coco-eval, or use CocoMetric.'
            )
    if args.tensorboard:
        cfg.visualizer.vis_backends.append(dict(type='TensorboardVisBackend'))
    return cfg


def _set_loader_defaults(cfg: Config) -> None:
    """MMPretrain's configs leave to its tools what makes loaders fast; a batch of images in one tensor most of all."""
    for loader in filter(None, (cfg.get(f'{split}_dataloader') for split in ('train', 'val', 'test'))):
        loader.setdefault('collate_fn', dict(type='default_collate'))
        loader.setdefault('pin_memory', torch.cuda.is_available())
        loader.setdefault('persistent_workers', loader.get('num_workers', 0) > 0)


def build_runner(cfg: Config) -> Runner:
    """Build the runner of a config, be it for several processes without GPUs, for which mmengine's own has no way.

    Raises:
        ConfigError: If ``cfg.launcher`` is not what has started this process, or if the processes have different
            configs.
    """
    _check_launcher(cfg.launcher)
    if cfg.launcher == 'pytorch' and get_device() == 'cpu':
        timeout = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout')  # in seconds, as mmengine has it
        torch.distributed.init_process_group('gloo', timeout=timeout and timedelta(seconds=timeout))
        default = dict(broadcast_buffers=False, find_unused_parameters=cfg.get('find_unused_parameters', False))
        cfg.model_wrapper_cfg = dict(cfg.get('model_wrapper_cfg') or default, device_ids=None)
    runner = Runner.from_cfg(cfg)
    _check_same_config(cfg)
    return runner


def _check_launcher(launcher: str) -> None:
    started = os.environ.get('WORLD_SIZE', '1') if torch.distributed.is_torchelastic_launched() else '1'
    if launcher == 'none' and started != '1':
        raise ConfigError(
            f'torchrun has started {started} processes, but each would work for itself and overwrite the files of the '
            'others: add --launcher pytorch.'
        )
    if launcher == 'pytorch' and 'RANK' not in os.environ:
        raise ConfigError(
            '--launcher pytorch: this process was not started by torchrun. Start torchrun --nproc-per-node N in place '
            'of python, or leave --launcher out.'
        )
    if launcher in ('slurm', 'mpi') and get_device() == 'cpu':
        raise ConfigError(
            f'--launcher {launcher} needs GPUs. Without them, let it start one torchrun a node, and give --launcher '
            'pytorch.'
        )


def _check_same_config(cfg: Config) -> None:
    """Processes of other iterations or other weights would wait for each other, or spoil each other's gradients."""
    mine = dict(_entries(cfg.to_dict()))
    first, *others = all_gather_object(mine)
    for rank, other in enumerate(others, start=1):
        keys = [key for key in sorted(first.keys() | other.keys()) if first.get(key) != other.get(key)]
        if keys:
            raise ConfigError(
                f'Process {rank} has another config than process 0: '
                + '; '.join(f'{key} is {other.get(key)}, not {first.get(key)}' for key in keys[:5])
                + ('; and so on' if keys[5:] else '')
                + '. All nodes need the same files and command, and a work dir that they share.'
            )


def _entries(value: Any, key: str = '') -> Iterator[tuple[str, str]]:
    """The values of a config by their dotted keys. Folders are left out: a node may have its own for the data."""
    if isinstance(value, (dict, list, tuple)):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _entries(item, f'{key}.{name}' if key else str(name))
    elif key == 'load_from':
        yield key, str(value and Path(value).name)
    elif isinstance(value, str) and ('/' in value or key in ('data_root', 'work_dir')):
        yield key, 'a path'
    else:
        yield key, repr(value) if isinstance(value, (bool, int, float, str)) else type(value).__name__


def replace_data_root(cfg: Config, data_root: str) -> Config:
    """Point every path of a config that begins with its ``data_root`` to another folder.

    A config repeats the path in its data loaders and evaluators, so overriding ``data_root`` alone would change
    nothing.

    Raises:
        ConfigError: If the config has no ``data_root``.
    """
    old = (cfg.get('data_root') or '').rstrip('/')
    if not old:
        raise ConfigError('--data-root replaces the data_root of the config, but this config has none.')
    new = os.path.expanduser(data_root).rstrip('/') + '/'

    def replace(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replace(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(replace(item) for item in value)
        if isinstance(value, str) and f'{value}/'.startswith(f'{old}/'):
            return new + value[len(old) :].lstrip('/')
        return value

    return Config(replace(cfg.to_dict()), filename=cfg.filename)
