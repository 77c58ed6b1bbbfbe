"""Train a detector, a classifier or a segmentor from an MMEngine config."""

import argparse

import torch
from mmengine.runner import Runner

from mmevm.cli import add_common_arguments, load_config, run, start
from mmevm.engine import load_from_safely, make_resumable, resume, use_fused_optimizer
from mmevm.errors import ConfigError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('--amp', action='store_true', help='train with automatic mixed precision; needs a GPU')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate to the total batch size, from base_batch_size of auto_scale_lr',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='resume from this checkpoint; without a value, from the latest valid checkpoint in the work dir',
    )
    add_common_arguments(parser)
    args = parser.parse_args()
    if args.amp and not torch.cuda.is_available():
        parser.error("--amp needs a GPU, because MMEngine's AmpOptimWrapper does. Remove it to train in float32.")
    return args


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    if args.amp:
        cfg.optim_wrapper.update(type='AmpOptimWrapper', loss_scale='dynamic')
    if args.auto_scale_lr:
        if 'auto_scale_lr' not in cfg:
            raise ConfigError(
                '--auto-scale-lr: the config does not say which batch size its learning rate is for. Add '
                'auto_scale_lr=dict(base_batch_size=…) to it.'
            )
        cfg.auto_scale_lr.enable = True
    make_resumable(cfg)
    use_fused_optimizer(cfg)
    if args.resume:
        resume(cfg, None if args.resume == 'auto' else args.resume)
    elif cfg.get('resume'):
        resume(cfg, cfg.get('load_from'))
    else:
        load_from_safely(cfg)
    if not torch.cuda.is_available():
        cfg.custom_hooks = [*cfg.get('custom_hooks', []), dict(type='mmevm.PeakMemoryHook')]
    start(cfg, ['train', 'val'], Runner.train, args.check)


if __name__ == '__main__':
    run(main)
