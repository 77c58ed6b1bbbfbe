"""What the command lines under tools/ share: common arguments, and how a config file becomes the config of a run."""

import argparse
import atexit
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mmengine.logging
import torch.distributed
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.dist import all_gather_object, is_main_process
from mmengine.hub import get_config
from mmengine.runner import Runner

from .checks import CheckHook, check_config, explain_errors
from .errors import ConfigError, UserError


def run(main: Callable[[], None]) -> None:
    """Run a command line; of an error that its sentence explains, print the sentence alone and exit with 1."""
    if torch.distributed.is_torchelastic_launched():
        from torch.distributed.elastic.multiprocessing.errors import record

        main = record(main)  # torchrun's last words are then the error of the process that failed first
    try:
        with _without_onedl_notice():
            main()
        _end_process_group()
    except UserError as error:
        sys.exit(f'{type(error).__name__}: {error}')


def _end_process_group() -> None:
    """End the process here if gloo's threads outlive their group, which DistributedDataParallel makes them do.

    They abort the interpreter now and then while it shuts down, and torchrun reports a failed run.
    """
    if not torch.distributed.is_initialized():
        return
    is_gloo = torch.distributed.get_backend() == 'gloo'
    torch.distributed.destroy_process_group()
    if is_gloo:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


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
        '--check',
        action='store_true',
        help='do everything up to the first iteration, print a summary, and exit with 0, or with 1 on an error',
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
    except KeyError as error:
        if 'Duplicate key' not in str(error):
            raise
        raise ConfigError(
            f'{path}: two configs in _base_ define the same keys ({error.args[0].rpartition(": ")[2]}). Keep one of '
            'them in _base_, and write what you need of the other into this config.'
        ) from error
    except Exception as error:
        # MMEngine asserts that it knows a package, and raises a TypeError for a dict over a base's string.
        known = (AssertionError, ImportError, OSError, TypeError, ValueError)
        if '::' not in path and not isinstance(error, known):
            raise  # an error in the config's own code
        where = '' if '::' in path else f' ({os.path.abspath(path)}; the current folder is {os.getcwd()})'
        raise ConfigError(
            f'{path} cannot be read: {error}{where}. Give the path of a config file, or of one in an installed '
            'package, such as mmdet::retinanet/retinanet_r50_fpn_1x_coco.py.'
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
    """Build the runner of a config, be it for several processes without GPUs, for which mmengine's own has no way.

    Raises:
        ConfigError: If ``cfg.launcher`` is not what has started this process, or if the processes have different
            configs.
    """
    _check_launcher(cfg.launcher)
    if cfg.launcher == 'pytorch' and get_device() == 'cpu':
        timeout = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout')  # in seconds, as mmengine has it
        options: dict[str, Any] = dict(timeout=timedelta(seconds=timeout)) if timeout else {}  # torch 2.1: not None
        torch.distributed.init_process_group('gloo', **options)
        default = dict(broadcast_buffers=False, find_unused_parameters=cfg.get('find_unused_parameters', False))
        cfg.model_wrapper_cfg = dict(cfg.get('model_wrapper_cfg') or default, device_ids=None)
    runner = Runner.from_cfg(cfg)
    _check_same_config(cfg)
    return runner


def start(cfg: Config, splits: Sequence[str], run_loop: Callable[[Runner], Any], check_only: bool = False) -> None:
    """Build the runner of a config and start it, with checks around both.

    Args:
        cfg: A config of MMEngine's runner.
        splits: The splits that are used, out of 'train', 'val' and 'test'.
        run_loop: Starts the runner.
        check_only: Stop before the first iteration with a summary and exit status 0. Nothing is written to work_dir.

    Raises:
        ConfigError: If the config or its data cannot be used.
    """
    warnings, hook = check_config(cfg, splits), CheckHook(check_only)
    with ExitStack() as stack:
        if check_only:
            cfg.work_dir = stack.enter_context(TemporaryDirectory(prefix='mmevm_check_', ignore_cleanup_errors=True))
            cfg.log_level = 'WARNING'
            if cfg.get('visualizer'):
                cfg.visualizer.vis_backends = None
        stack.enter_context(explain_errors(cfg, hook))
        runner = build_runner(cfg)
        if is_main_process():
            for warning in warnings:
                runner.logger.warning(warning)
        runner.register_hook(hook)
        run_loop(runner)


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


# Processes that differ in these would wait for each other, or mix gradients of different models.
_SHARED_KEYS = ('load_from', 'model', 'optim_wrapper', 'param_scheduler', 'resume', 'train_cfg', 'train_dataloader')


def _check_same_config(cfg: Config) -> None:
    """Compare what processes must have in common; names of runs and paths may differ."""
    shared = {key: cfg.get(key) for key in _SHARED_KEYS}
    first, *others = all_gather_object(dict(_entries(Config(shared).to_dict())))
    for rank, other in enumerate(others, start=1):
        keys = [key for key in sorted(first.keys() | other.keys()) if first.get(key) != other.get(key)]
        if keys:
            raise ConfigError(
                f'Process {rank} has another config than process 0: '
                + '; '.join(f'{key} is {other.get(key)}, not {first.get(key)}' for key in keys[:5])
                + ('; and so on' if keys[5:] else '')
                + '. All nodes need the same config file and command line, and a shared work_dir.'
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
        ConfigError: If the config has no ``data_root``, or no path below it.
    """
    old = (cfg.get('data_root') or '').rstrip('/')
    if not old:
        raise ConfigError('--data-root replaces the data_root of the config, but this config has none.')
    new = os.path.expanduser(data_root).rstrip('/') + '/'
    replaced = 0

    def replace(value: Any) -> Any:
        nonlocal replaced
        if isinstance(value, dict):
            return {key: replace(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(replace(item) for item in value)
        if isinstance(value, str) and f'{value}/'.startswith(f'{old}/'):
            replaced += 1
            return new + value[len(old) :].lstrip('/')
        return value

    result = Config(replace(cfg.to_dict()), filename=cfg.filename)
    if replaced < 2:  # data_root itself is one
        raise ConfigError(
            f'--data-root {data_root} changed nothing: no path of the config but data_root={cfg.data_root!r} itself '
            'begins with it. Correct data_root in the config, or override the paths with --cfg-options.'
        )
    return result
