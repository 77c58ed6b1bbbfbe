"""Export a backbone, a classifier, a detector, a segmentor or a part of it to ONNX, for any batch size and image size.

The input of the file, `image`, is a batch of preprocessed images: (B, C, H, W) in float32, channels in the order of
`channel_order`, minus `image_mean`, divided by `image_std`; the metadata of the file contains these values. The file is
compared with PyTorch in ONNX Runtime before it is written, at three sizes unless --shape gives one.
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
from mmevm.deployment.export import OPSET, export_onnx
from mmevm.deployment.model_part import EXAMPLE_SIZE, PARTS, ModelPart, preprocessing
from mmevm.errors import ConfigError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file, or one within a package such as mmdet::retinanet/….py')
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help='checkpoint of the model, a file or URL; for a classifier or a backbone also a timm:// name (default: '
        'random weights, for measuring speed)',
    )
    parser.add_argument('out', type=Path, help='file to write, such as retinanet_evm_m4.onnx')
    parser.add_argument(
        '--part',
        choices=PARTS,
        help='backbone: its maps; neck: the pyramid of a detector; model: the logits of a classifier, or the raw '
        'outputs of the heads of a one-stage detector; detections: boxes, scores and labels after post-processing; '
        'of a segmentor, model: the logits at the size of the image, class_map: the class of each pixel '
        '(default: model for a classifier or segmentor, neck for a detector)',
    )
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        metavar='PIXELS',
        help='export for one image of this height and width, or of this side (default: any batch size and image size)',
    )
    parser.add_argument(
        '--deploy',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='whether to switch the model to deploy mode first',
    )
    parser.add_argument('--opset', type=int, default=OPSET, help=f"version of ONNX's operators (default: {OPSET})")
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override entries of the config, as in tools/train.py; use model.backbone.deploy=True for a checkpoint '
        'saved in deploy mode',
    )
    args = parser.parse_intermixed_args()  # options may stand between the three
    if args.out.suffix != '.onnx':
        parser.error(f'out={args.out}: expected a name that ends in .onnx, as the last argument.')
    if args.shape and (len(args.shape) > 2 or min(args.shape) < 1):
        parser.error(f'--shape {args.shape}: expected a height and a width, or one side, in pixels.')
    if args.opset < OPSET:
        parser.error(f'--opset {args.opset}: expected {OPSET} or later.')
    return args


def load(part: ModelPart, checkpoint: str) -> None:
    if part.part == 'backbone':
        load_pretrained(part.model.backbone, checkpoint)
    else:
        load_strict(part.model, checkpoint)


def deploy_copy(model: nn.Module) -> nn.Module:
    try:
        return deploy(copy.deepcopy(model))
    except (TypeError, ValueError) as error:
        raise ConfigError(f'{error} Use --no-deploy to export the model as it is.') from error


def name_of(source: str) -> str:
    """Return a URL or a file of a package as it is, and the name of a local file without its folder."""
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
    part = ModelPart(deploy_copy(trained.model), trained.part) if args.deploy else trained
    constants = part.disable_score_threshold()
    trained.disable_score_threshold()
    difference = export_onnx(
        part,
        args.out,
        torch.randn(shape),
        dynamic=not args.shape,
        output_names=names,
        metadata=metadata,
        opset=args.opset,
        reference=trained,
        compare=part.compare,
        constants=constants,
    )

    for name, value in metadata.items():
        print(f'{name}: {value}')
    sizes = '×'.join(map(str, shape)) if args.shape else f'batch×{channels}×height×width, any but channels'
    print(f'input: image, {sizes}')
    print(f'outputs: {", ".join(names)}')
    print(f'largest difference from PyTorch, relative to the largest value of an output: {difference:.1e}')
    if not args.checkpoint:
        print('WARNING: no checkpoint was given, so the weights are random: use the file to measure speed only.')
    print(f'wrote {args.out}')


if __name__ == '__main__':
    run(main)
