"""Write an ONNX file of a classifier, a detector or a part of it, or a backbone, for any number and size of images.

The input of the file, `image`, is what the data preprocessor makes of pixels: (B, C, H, W) in float32, with channels
in the order of `channel_order`, minus `image_mean`, divided by `image_std`; the file's metadata says what these are. It
is compared with PyTorch in ONNX Runtime, at three sizes unless --shape names one, before it is written.

A name that ends in .mlpackage asks for CoreML in place of ONNX, of one --shape. It is converted by coremltools, and its
outputs are not compared, which takes a Mac.
"""

import argparse
import copy
from pathlib import Path

import torch
from mmengine.config import DictAction
from torch import nn

from mmevm import __version__
from mmevm.analysis import build_without_weights
from mmevm.checkpoints import load_pretrained, load_strict
from mmevm.cli import read_config, run
from mmevm.deployment import deploy
from mmevm.deployment.export import EXAMPLE_SIZE, OPSET, PARTS, ModelPart, export_coreml, export_onnx, preprocessing
from mmevm.errors import ConfigError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file, or one within a package such as mmdet::retinanet/….py')
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help='what the model was trained to, a file or URL; of a classifier, or of a backbone alone, also a timm:// '
        'name (default: random weights, for measuring speed)',
    )
    parser.add_argument('out', type=Path, help='the file to write, such as retinanet_evm_m4.onnx')
    parser.add_argument(
        '--part',
        choices=PARTS,
        help="backbone: its maps; neck: a detector's pyramid; model: a classifier's logits, or the scores and boxes of "
        "a one-stage detector's heads; detections: the boxes, scores and labels that these become (default: model of a "
        'classifier, neck of a detector)',
    )
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        metavar='PIXELS',
        help='for one image of this height and width, or side of a square, and no other (default: any number and size)',
    )
    parser.add_argument(
        '--deploy', action=argparse.BooleanOptionalAction, default=True, help='whether constants are multiplied out'
    )
    parser.add_argument('--opset', type=int, default=OPSET, help=f"version of ONNX's operators (default: {OPSET})")
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override entries of the config, as in tools/train.py; model.backbone.deploy=True is for a checkpoint '
        'that was saved in the deploy form',
    )
    args = parser.parse_intermixed_args()  # options may stand between the three
    if args.out.suffix not in ('.onnx', '.mlpackage'):
        parser.error(f'{args.out}: the file to write comes last, and its name has to end in .onnx, or .mlpackage.')
    if args.out.suffix == '.mlpackage' and not args.shape:
        parser.error(f'{args.out}: a CoreML package is of one size: name it with --shape.')
    if args.shape and (len(args.shape) > 2 or min(args.shape) < 1):
        parser.error(f'--shape takes a height and a width, or one side, in pixels: not {args.shape}.')
    if args.opset < OPSET:
        parser.error(f'--opset {args.opset}: the exporter writes {OPSET} and later ones.')
    return args


def load(part: ModelPart, checkpoint: str) -> None:
    if part.part == 'backbone':
        load_pretrained(part.model.backbone, checkpoint)
    else:
        load_strict(part.model, checkpoint)


def deployed(model: nn.Module) -> nn.Module:
    try:
        return deploy(copy.deepcopy(model))
    except ValueError as error:
        raise ConfigError(f'{error} --no-deploy exports the model as it is.') from error


def name_of(source: str) -> str:
    """A URL or a file within a package as it is, of a file on this disk the name alone."""
    return source if ':' in source else Path(source).name


def main() -> None:
    args = parse_args()
    cfg = read_config(args.config)
    cfg.merge_from_dict(args.cfg_options or {})
    torch.manual_seed(0)
    trained = ModelPart(build_without_weights(cfg), args.part)
    if args.checkpoint:
        load(trained, args.checkpoint)
    trained.eval()
    channels = cfg.model.get('backbone', {}).get('in_channels', 3)
    names = trained.output_names(channels)
    shape = (1, channels, args.shape[0], args.shape[-1]) if args.shape else (2, channels, *EXAMPLE_SIZE)
    metadata = {
        'mmevm_version': __version__,
        'config': name_of(args.config),
        'part': trained.part,
        'weights': name_of(args.checkpoint) if args.checkpoint else 'random',
        'deployed': str(args.deploy).lower(),
        'strides': ' '.join(dict.fromkeys(name.partition('stride')[2] for name in names if 'stride' in name)),
        **preprocessing(cfg),
    }
    part = ModelPart(deployed(trained.model), trained.part) if args.deploy else trained
    example, about = torch.randn(shape), dict(output_names=names, metadata=metadata)
    if args.out.suffix == '.mlpackage':
        export_coreml(part, args.out, example, **about)
        check = 'not compared with PyTorch: CoreML runs on a Mac only'
    else:
        about |= dict(opset=args.opset, reference=trained, compare=part.compare, constants=part.lift_threshold())
        trained.lift_threshold()
        difference = export_onnx(part, args.out, example, dynamic=not args.shape, **about)
        check = f'largest difference from PyTorch, relative to the largest value of an output: {difference:.1e}'

    for name, value in metadata.items():
        print(f'{name}: {value}')
    sizes = '×'.join(map(str, shape)) if args.shape else f'batch×{channels}×height×width, any but channels'
    print(f'input: image, {sizes}')
    print(f'outputs: {", ".join(names)}')
    print(check)
    if not args.checkpoint:
        print('WARNING: no checkpoint was named, so the weights are random: the file is for measuring speed only.')
    print(f'written: {args.out}')


if __name__ == '__main__':
    run(main)
