"""What the command lines under tools/ share: common arguments, and how a config file becomes the config of a run."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch.distributed
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.hub import get_config
from mmengine.runner import Runner

from .checkpoints import CheckpointError
from .export import ExportError
from .preflight import ConfigError


def run(main: Callable[[], None]) -> None:
    """Run a command line; of an error that its sentence explains, print the sentence alone and exit with 1."""
    try:
        main()
    except (CheckpointError, ConfigError, ExportError) as error:
        sys.exit(f'{type(error).__name__}: {error}')


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
    """Build the runner of a config, be it for several processes without GPUs, for which mmengine's own has no way."""
    if cfg.launcher == 'pytorch' and get_device() == 'cpu':
        torch.distributed.init_process_group('gloo')
        default = dict(broadcast_buffers=False, find_unused_parameters=cfg.get('find_unused_parameters', False))
        cfg.model_wrapper_cfg = dict(cfg.get('model_wrapper_cfg') or default, device_ids=None)
    return Runner.from_cfg(cfg)


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

    def replace(value):
        if isinstance(value, dict):
            return {key: replace(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(replace(item) for item in value)
        if isinstance(value, str) and f'{value}/'.startswith(f'{old}/'):
            return new + value[len(old) :].lstrip('/')
        return value

    return Config(replace(cfg.to_dict()), filename=cfg.filename)
