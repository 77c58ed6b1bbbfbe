"""Code that the scripts in tools/ share: common arguments, reading configs, starting a runner, printing errors."""

import argparse
import atexit
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
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
from .checks.config import iter_dicts, preview
from .config_path import PREFIX, find_config
from .distributions import check_segmentation
from .errors import ConfigError, UserError


def run(main: Callable[[], None]) -> None:
    """Run the main function of a script. Print a :class:`UserError` without a traceback and exit with status 1."""
    if torch.distributed.is_torchelastic_launched():
        from torch.distributed.elastic.multiprocessing.errors import record

        main = record(main)  # torchrun then prints the error of the process that failed first
    print_log = mmengine.logging.print_log

    def print_others(msg: Any, *args: Any, **kwargs: Any) -> None:
        # onedl's mmdet and mmpretrain print on import that the unrelated package onedl is not installed
        if not str(msg).startswith('Could not import OneDL'):
            print_log(msg, *args, **kwargs)

    mmengine.logging.print_log = print_others
    try:
        main()
        _end_process_group()
    except UserError as error:
        sys.exit(f'{type(error).__name__}: {error}')
    finally:
        mmengine.logging.print_log = print_log


def _end_process_group() -> None:
    # Threads of gloo outlive their process group under DistributedDataParallel. They sometimes abort the interpreter
    # while it shuts down, and torchrun reports a failure. So exit without shutting down.
    if not torch.distributed.is_initialized():
        return
    is_gloo = torch.distributed.get_backend() == 'gloo'
    torch.distributed.destroy_process_group()
    if is_gloo:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of both training and testing, named as in MMDetection."""
    parser.add_argument('--work-dir', help='folder for logs and checkpoints (default: work_dirs/CONFIG_NAME)')
    parser.add_argument('--data-root', help='folder of the data; replaces data_root in all paths of the config')
    parser.add_argument('--tensorboard', action='store_true', help='also write TensorBoard files to the work dir')
    parser.add_argument(
        '--check', action='store_true', help='stop after the first iteration, print a summary and write nothing'
    )
    add_config_options(parser)
    launchers = ['none', 'pytorch', 'slurm', 'mpi']
    parser.add_argument('--launcher', choices=launchers, default='none', help='use pytorch for torchrun')
    # torch.distributed.launch passes an argument, torchrun an environment variable.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


class _OptionsAction(DictAction):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for value in values:
            if '=' not in value:
                raise argparse.ArgumentError(
                    self,
                    f'{value}: expected key=value. Put --cfg-options after the other arguments, and quote values that '
                    'contain spaces: key="[a, b]".',
                )
        super().__call__(parser, namespace, values, option_string)


def add_config_options(parser: argparse.ArgumentParser, note: str = '') -> None:
    """Add ``--cfg-options``, as in MMDetection."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_OptionsAction,
        metavar='KEY=VALUE',
        help=f'override config values: key=value, nested keys with dots, lists as key="[a,b]"{note}',
    )


def read_config(path: str) -> Config:
    """Read a config from a file or from a package, such as ``mmevm::maskrcnn_evm_m4.py``.

    Raises:
        ConfigError: If it cannot be read, or needs MMSegmentation and that is not installed.
    """
    if path.startswith(PREFIX):
        path = str(find_config(path))
    try:
        cfg = get_config(path) if '::' in path else Config.fromfile(path)
    except (AssertionError, ImportError, OSError, TypeError, ValueError) as error:
        where = '' if '::' in path else f' ({os.path.abspath(path)}; the current folder is {os.getcwd()})'
        raise ConfigError(
            f'{path} cannot be read: {error}{where}. Give the path of a config file, or the name of a config in an '
            'installed package, such as mmdet::retinanet/retinanet_r50_fpn_1x_coco.py.'
        ) from error
    if cfg.get('default_scope') == 'mmseg':
        check_segmentation()
    return cfg


def load_config(args: argparse.Namespace) -> Config:
    """Read ``args.config`` and apply the arguments of :func:`add_common_arguments`.

    Raises:
        ConfigError: If the config cannot be read, or ``args.data_root`` changes nothing.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args.config)
    if args.data_root:
        cfg = replace_data_root(cfg, args.data_root)
    cfg.launcher = args.launcher
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    if cfg.get('default_scope') == 'mmpretrain':
        # as MMPretrain's own tools do
        for loader in filter(None, (cfg.get(f'{split}_dataloader') for split in ('train', 'val', 'test'))):
            loader.setdefault('collate_fn', dict(type='default_collate'))
            loader.setdefault('pin_memory', torch.cuda.is_available())
            loader.setdefault('persistent_workers', loader.get('num_workers', 0) > 0)
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs', Path(args.config).stem))
    if args.tensorboard:
        cfg.visualizer.vis_backends.append(dict(type='TensorboardVisBackend'))
    return cfg


def build_runner(cfg: Config) -> Runner:
    """Build the runner of a config, also for several processes without GPUs, which MMEngine does not support.

    Raises:
        ConfigError: If ``cfg.launcher`` did not start this process, or if the processes have different configs.
    """
    _check_launcher(cfg.launcher)
    if cfg.launcher == 'pytorch' and get_device() == 'cpu':
        seconds = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout', 1800)  # PyTorch's default
        torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=seconds))
        default = dict(broadcast_buffers=False, find_unused_parameters=cfg.get('find_unused_parameters', False))
        cfg.model_wrapper_cfg = dict(cfg.get('model_wrapper_cfg') or default, device_ids=None)
    runner = Runner.from_cfg(cfg)
    _check_same_config(cfg)
    return runner


def start(cfg: Config, splits: Sequence[str], run_loop: Callable[[Runner], Any], check_only: bool = False) -> None:
    """Check a config, build its runner and start it.

    Args:
        cfg: A config for MMEngine's runner.
        splits: The splits in use, out of 'train', 'val' and 'test'.
        run_loop: Starts the runner.
        check_only: Print a summary after the first iteration and exit with status 0. Write nothing to work_dir.

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
    processes = os.environ.get('WORLD_SIZE', '1') if torch.distributed.is_torchelastic_launched() else '1'
    if launcher == 'none' and processes != '1':
        raise ConfigError(
            f'--launcher none: torchrun started {processes} processes, which would overwrite the files of each other. '
            'Add --launcher pytorch.'
        )
    if launcher == 'pytorch' and 'RANK' not in os.environ:
        raise ConfigError('--launcher pytorch: start the tool with torchrun --nproc-per-node N instead of python.')


# Processes that differ in these keys would wait for each other, or average gradients of different models.
_SHARED_KEYS = ('model', 'optim_wrapper', 'param_scheduler', 'resume', 'train_cfg', 'train_dataloader')


def _check_same_config(cfg: Config) -> None:
    values = {'load_from': repr(cfg.get('load_from') and Path(cfg.load_from).name)}
    for key, part in iter_dicts({key: cfg.get(key) for key in _SHARED_KEYS}):
        values |= {f'{key}.{name}'.lstrip('.'): repr(value) for name, value in part.items() if _is_shared(value)}
    first, *others = all_gather_object(values)
    for rank, other in enumerate(others, start=1):
        keys = [key for key in sorted(first.keys() | other.keys()) if first.get(key) != other.get(key)]
        if keys:
            differences = preview(f'{key} is {other.get(key)}, not {first.get(key)}' for key in keys)
            raise ConfigError(
                f'Process {rank} has another config than process 0: {differences}. Use the same config file and '
                'arguments on all nodes, and a shared work_dir.'
            )


def _is_shared(value: Any) -> bool:
    """Return whether processes must agree on a value. Paths may differ: nodes may keep data in different folders."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_shared, value))
    return isinstance(value, (bool, int, float, str)) and '/' not in str(value)


def replace_data_root(cfg: Config, data_root: str) -> Config:
    """Replace ``data_root`` in all paths of a config that begin with it.

    Data loaders and evaluators of a config contain the path too, so overriding ``data_root`` alone changes nothing.

    Raises:
        ConfigError: If the config has no ``data_root``, or no other path that begins with it.
    """
    old = (cfg.get('data_root') or '').rstrip('/')
    if not old:
        raise ConfigError('--data-root: the config has no data_root to replace. Set its paths with --cfg-options.')
    new = os.path.expanduser(data_root).rstrip('/') + '/'
    replaced = []

    def replace(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: replace(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(replace(item) for item in value)
        if isinstance(value, str) and f'{value}/'.startswith(f'{old}/'):
            replaced.append(value)
            return new + value[len(old) :].lstrip('/')
        return value

    result = Config(replace(cfg.to_dict()), filename=cfg.filename)
    if len(replaced) < 2:  # data_root itself is one
        raise ConfigError(
            f'--data-root {data_root}: no path of the config begins with data_root={cfg.data_root!r}, so nothing would '
            'change. Correct data_root in the config, or override the paths with --cfg-options.'
        )
    return result
