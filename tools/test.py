"""Evaluate a detector, a classifier or a segmentor: metrics, pictures of its predictions, or files with them."""

import argparse
from pathlib import Path

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.runner import Runner

from mmevm.checks.config import iter_datasets, type_name
from mmevm.cli import add_common_arguments, load_config, run, start
from mmevm.deployment.session import ENGINES, describe_missing_instructions
from mmevm.errors import ConfigError
from mmevm.inference.evaluation import use_onnx_file


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        'checkpoint',
        help='checkpoint file, a URL or, of a classifier, a timm:// name; or a file exported to ONNX with --part '
        'detections, of a classifier or segmentor with --part model',
    )
    parser.add_argument(
        '--engine', choices=ENGINES, default='onnxruntime', help='what runs an exported file (default: onnxruntime)'
    )
    parser.add_argument(
        '--dtype',
        choices=['float32', 'bfloat16'],
        default='float32',
        help='what convolutions and matrix products compute in, by autocast in PyTorch; an exported file also needs '
        '--engine openvino (default: float32)',
    )
    parser.add_argument('--out', help='write all predictions to this pickle file')
    parser.add_argument(
        '--show-dir',
        type=Path,
        help='write pictures with predictions (right) here, beside the ground truth (left) unless of classes',
    )
    parser.add_argument(
        '--format-only',
        metavar='PREFIX',
        help="evaluate nothing, but write PREFIX.bbox.json (and PREFIX.segm.json) in the format of COCO's server; of a "
        'segmentor, one PNG file with labels for each image to the folder PREFIX',
    )
    add_common_arguments(parser)
    args = parser.parse_args()
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        parser.error(f'--out {args.out}: it is a pickle file, so its name has to end in .pkl or .pickle.')
    return args


def draw(cfg: Config, folder: str) -> None:
    """Write a picture of each test image to a folder."""
    hook, scope = cfg.default_hooks.visualization, cfg.get('default_scope')
    if scope == 'mmdet':
        hook.update(draw=True, test_out_dir=folder)
    elif scope == 'mmseg':
        hook.update(draw=True, interval=1)
        cfg.visualizer.vis_backends = [dict(type='LocalVisBackend', img_save_dir=folder)]
    else:
        hook.update(enable=True, interval=1, out_dir=folder)


def remove_label_loading(cfg: Config) -> None:
    """Remove the loading of label maps, which the images of a test server do not have."""
    for _, dataset in iter_datasets(cfg, 'test'):
        dataset.pipeline = [step for step in dataset.pipeline if type_name(step) != 'LoadAnnotations']


def main() -> None:
    args = parse_args()
    cfg = load_config(args)
    scope = cfg.get('default_scope')
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    if args.format_only:
        keys = dict(CocoMetric='outfile_prefix', IoUMetric='output_dir', CityscapesMetric='output_dir')
        formatting = [evaluator for evaluator in evaluators if type_name(evaluator) in keys]
        if not formatting:
            raise ConfigError(
                '--format-only is for detectors and segmentors: test_evaluator of this config has no metric out of '
                f'{", ".join(keys)}.'
            )
        for evaluator in formatting:
            evaluator.update({'format_only': True, keys[type_name(evaluator)]: args.format_only})
        if scope == 'mmseg':
            remove_label_loading(cfg)
    if args.out:
        dump = dict(type='DumpDetResults' if scope == 'mmdet' else 'DumpResults', out_file_path=args.out)
        cfg.test_evaluator = [*evaluators, dump]
    if args.show_dir:
        draw(cfg, str(args.show_dir.absolute()))
    if args.checkpoint.endswith('.onnx'):
        use_onnx_file(cfg, args.checkpoint, args.engine, args.dtype)
    else:
        cfg.load_from, cfg.resume = f'safe://{args.checkpoint}', False
        cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='mmevm.CheckpointCheckHook', strict=True)]
        if args.dtype != 'float32':
            cfg.custom_hooks.append(dict(type='mmevm.AutocastHook', dtype=args.dtype))
    missing = describe_missing_instructions(args.dtype) if args.dtype != 'float32' and get_device() == 'cpu' else None
    if missing:
        print(f'WARNING: {missing}')
    start(cfg, ['test'], Runner.test, args.check)


if __name__ == '__main__':
    run(main)
