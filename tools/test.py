"""Evaluate a detector or a classifier. Optionally write its predictions as images or files."""

import argparse
from pathlib import Path

from mmengine.runner import Runner

from mmevm.checkpoints import load_trained_weights
from mmevm.checks.config import type_name
from mmevm.cli import add_common_arguments, load_config, run, start
from mmevm.errors import ConfigError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file, URL or, for a classifier, a timm:// name')
    parser.add_argument('--out', help='write all predictions to this pickle file')
    parser.add_argument(
        '--show-dir',
        type=Path,
        help='write images with predictions to this folder (for a detector, ground truth left and predictions right)',
    )
    parser.add_argument(
        '--format-only',
        metavar='PREFIX',
        help='do not evaluate; write PREFIX.bbox.json (and PREFIX.segm.json) in the format of the COCO server',
    )
    add_common_arguments(parser)
    args = parser.parse_args()
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out {args.out} must end in .pkl or .pickle, because it is a pickle file.')
    return args


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    detection = cfg.get('default_scope') == 'mmdet'
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    if args.format_only:
        formatting = [evaluator for evaluator in evaluators if type_name(evaluator) == 'CocoMetric']
        if not formatting:
            raise ConfigError('--format-only is for detectors: test_evaluator of the config has no CocoMetric.')
        for evaluator in formatting:
            evaluator.update(format_only=True, outfile_prefix=args.format_only)
    if args.out:
        dump = dict(type='DumpDetResults' if detection else 'DumpResults', out_file_path=args.out)
        cfg.test_evaluator = [*evaluators, dump]
    if args.show_dir:
        folder = str(args.show_dir.absolute())
        cfg.default_hooks.visualization.update(
            dict(draw=True, test_out_dir=folder) if detection else dict(enable=True, interval=1, out_dir=folder)
        )
    cfg.load_from, cfg.resume = None, False  # only the checkpoint of the command line counts

    def test(runner: Runner) -> None:
        load_trained_weights(runner, args.checkpoint)
        runner.cfg.load_from = args.checkpoint  # for the summary of --check
        runner.test()

    start(cfg, ['test'], test, args.check)


if __name__ == '__main__':
    run(main)
