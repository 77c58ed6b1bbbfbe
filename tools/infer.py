"""Run a trained model, also one exported to ONNX, on images, folders, videos, a camera or URLs.

Pictures go to OUT_DIR/vis and predictions to OUT_DIR/preds, one JSON file for each image or frame, with the keys of
MMDetection's DetInferencer (of a classifier: of MMPretrain's ImageClassificationInferencer). Of a segmentor, the JSON
file lists the classes of the image and names a PNG file that holds the class of each pixel.
"""

import argparse

from mmevm.cli import add_config_options, read_config, run
from mmevm.errors import UserError
from mmevm.inference import Predictor, build_inferencer, build_onnx_inferencer, find_inputs


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage='%(prog)s [options] CONFIG CHECKPOINT INPUT [INPUT …]\n'
        '       %(prog)s [options] MODEL.onnx INPUT [INPUT …]',
    )
    parser.add_argument(
        'config',
        metavar='CONFIG CHECKPOINT | MODEL.onnx',
        help='config file, and checkpoint file, a URL or, of a classifier, a timm:// name; or a file exported with '
        '--part detections, of a classifier or segmentor with --part model',
    )
    parser.add_argument(
        'inputs',
        nargs='+',
        metavar='INPUT',
        help='an image or video file, a folder, a quoted glob pattern, a camera index or an http(s) URL',
    )
    parser.add_argument('--out-dir', '--out', default='outputs', help='folder for the results (default: outputs)')
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='lowest score of the objects that are drawn; the JSON files hold all of them (default: 0.3)',
    )
    parser.add_argument('--device', help='cpu, cuda, cuda:1, mps … (default: a GPU if there is one)')
    parser.add_argument('--batch-size', type=int, default=1, help='images or frames at once (default: 1)')
    parser.add_argument('--no-save-vis', action='store_true', help='write JSON files only')
    parser.add_argument('--deploy', action='store_true', help='fuse layers first: the same results, faster')
    parser.add_argument('--show', action='store_true', help='show pictures in a window (any key: next, q: quit)')
    add_config_options(parser)
    args = parser.parse_intermixed_args()  # options may stand between inputs
    args.checkpoint = None
    if not args.config.endswith('.onnx'):
        args.checkpoint, *args.inputs = args.inputs
    elif args.deploy or args.cfg_options:
        parser.error('--deploy and --cfg-options: give them to tools/export_onnx.py, which writes the file.')
    if not args.inputs:
        parser.error('INPUT is missing: give CONFIG CHECKPOINT INPUT, or MODEL.onnx INPUT.')
    if args.batch_size < 1:
        parser.error(f'--batch-size {args.batch_size}: expected a number from 1 on.')
    if not 0 <= args.score_thr <= 1:
        parser.error(f'--score-thr {args.score_thr}: expected a number from 0 to 1.')
    return args


def main() -> None:
    args = parse_args()
    inputs = find_inputs(args.inputs)
    if args.checkpoint is None:
        inferencer = build_onnx_inferencer(args.config, args.device)
    else:
        cfg = read_config(args.config)
        cfg.merge_from_dict(args.cfg_options or {})
        inferencer = build_inferencer(cfg, args.checkpoint, args.device, args.deploy)
    predictor = Predictor(
        inferencer,
        args.out_dir,
        score_thr=args.score_thr,
        batch_size=args.batch_size,
        save_vis=not args.no_save_vis,
        show=args.show,
    )
    count = predictor.run(inputs)
    print(f'{count} images or frames written to {args.out_dir}')
    if predictor.skipped:
        total = len(inputs.images) + len(inputs.videos)
        raise UserError(
            f'{len(predictor.skipped)} of {total} inputs could not be read and were skipped: '
            f'{", ".join(map(str, predictor.skipped))}. Check that they are complete images or videos.'
        )


if __name__ == '__main__':
    run(main)
