"""Evaluate a detector or a classifier: metrics, pictures of its predictions, or files with them."""

import argparse
from pathlib import Path

from mmengine.runner import Runner

from mmevm.checkpoints import load_trained_weights
from mmevm.cli import add_common_arguments, load_config, run
from mmevm.preflight import check_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', help='write all predictions to this pickle file')
    parser.add_argument(
        '--show-dir', type=Path, help='write pictures here: ground truth on the left, predictions on the right'
    )
    parser.add_argument(
        '--format-only',
        metavar='PREFIX',
        help="evaluate nothing, but write PREFIX.bbox.json (and PREFIX.segm.json) in the format of COCO's server",
    )
    add_common_arguments(parser)
    args = parser.parse_args()
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out {args.out}: it is a pickle file, so its name has to end in .pkl or .pickle.')
    return args


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    detection = cfg.default_scope == 'mmdet'
    if args.format_only:
        cfg.test_evaluator.update(format_only=True, outfile_prefix=args.format_only)
    if args.out:
        dump = dict(type='DumpDetResults' if detection else 'DumpResults', out_file_path=args.out)
        cfg.test_evaluator = [cfg.test_evaluator, dump]
    if args.show_dir:
        folder = str(args.show_dir.absolute())
        cfg.default_hooks.visualization.update(
            dict(draw=True, test_out_dir=folder) if detection else dict(enable=True, out_dir=folder)
        )
    check_config(cfg, ['test'])
    cfg.load_from = None  # the checkpoint of the command line, and all of it
    runner = Runner.from_cfg(cfg)
    load_trained_weights(runner, args.checkpoint)
    runner.test()


if __name__ == '__main__':
    run(main)
