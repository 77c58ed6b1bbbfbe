"""Train a detector or a classifier from an MMEngine config."""

import argparse
from logging import WARNING
from pathlib import Path

import torch
from mmengine.logging import print_log
from mmengine.runner import find_latest_checkpoint

from mmevm.checkpoints import CheckpointError
from mmevm.cli import add_common_arguments, build_runner, load_config, run
from mmevm.preflight import ConfigError, check_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('--amp', action='store_true', help='train with automatic mixed precision (on a GPU)')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help="scale the learning rate to the batch, as the config's auto_scale_lr says",
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='continue from this checkpoint or, without a value, from the latest one in the work dir',
    )
    add_common_arguments(parser)
    args = parser.parse_args()
    if args.amp and not torch.cuda.is_available():
        parser.error("--amp needs a GPU: mmengine's AmpOptimWrapper has no CPU mode. Leave it out to train in float32.")
    return args


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    if args.amp:
        cfg.optim_wrapper.update(type='AmpOptimWrapper', loss_scale='dynamic')
    if args.auto_scale_lr:
        if 'auto_scale_lr' not in cfg:
            raise ConfigError(
                '--auto-scale-lr needs to know the batch that the learning rate belongs to, but this config does not '
                'say: add auto_scale_lr=dict(base_batch_size=…) to it.'
            )
        cfg.auto_scale_lr.enable = True
    if args.resume:
        if args.resume != 'auto' and '://' not in args.resume and not Path(args.resume).is_file():
            raise CheckpointError(f'There is no checkpoint {args.resume} to resume from: check the path.')
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
        if (cfg.load_from or find_latest_checkpoint(cfg.work_dir)) is None:
            print_log(f'There is nothing in {cfg.work_dir} to resume from: the training starts anew.', level=WARNING)
        else:
            for part in (cfg.model, cfg.model.get('backbone'), cfg.model.get('head')):
                if part and part.get('init_cfg'):
                    part.init_cfg = None  # pretrained weights would be fetched, and overwritten
    if not torch.cuda.is_available():
        cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='mmevm.PeakMemoryHook')]
    check_config(cfg, ['train', 'val'])
    build_runner(cfg).train()


if __name__ == '__main__':
    run(main)
