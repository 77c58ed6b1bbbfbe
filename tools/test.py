"""Evaluate a detector or a classifier: metrics, pictures of its predictions, or files with them."""

import argparse
from pathlib import Path

from mmengine.runner import Runner

from mmevm.checks.config import type_name
from mmevm.cli import add_common_arguments, load_config, run, start
from mmevm.errors import ConfigError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file, a URL or, of a classifier, a timm:// name')
    parser.add_argument('--out', help='write all predictions to this pickle file')
    parser.add_argument(
        '--show-dir',
        type=Path,
        help='write pictures with predictions here (of detections: on the right, with the ground truth on the left)',
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
    detection = cfg.get('default_scope') == 'mmdet'
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    if args.format_only:
        formatting = [evaluator for evaluator in evaluators if type_name(evaluator) == 'CocoMetric']
        if not formatting:
            raise ConfigError(
                '--format-only is for detectors: there is no CocoMetric in test_evaluator of this config.'
            )
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
    cfg.load_from, cfg.resume = f'safe://{args.checkpoint}', False
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='mmevm.CheckpointCheckHook', strict=True)]
    start(cfg, ['test'], Runner.test, args.check)


if __name__ == '__main__':
    run(main)
