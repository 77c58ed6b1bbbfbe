"""Export a backbone, a classifier, a detector, a segmentor or a part of it to ONNX, for any batch size and image size.

The input of the file, `image`, is a batch of preprocessed images: (B, C, H, W) in float32, channels in the order of
`channel_order`, minus `image_mean`, divided by `image_std`; the metadata of the file contains these values. The file is
compared with PyTorch in ONNX Runtime before it is written, on noise of three sizes unless --shape gives one, and with
--verify-images on real images; of an int8 file, the float32 file that it is made from is compared. The metadata also
contains class names, colors, thresholds, and how images are resized and padded.
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from mmevm import __version__
from mmevm.analysis import build_without_weights
from mmevm.checkpoints import load_pretrained, load_strict
from mmevm.cli import add_config_options, read_config, replace_data_root, run
from mmevm.deployment import deploy
from mmevm.deployment.export import OPSET, TOLERANCE, check_folder, export_onnx
from mmevm.deployment.metadata import check_pipeline, describe_preprocessing
from mmevm.deployment.model_part import EXAMPLE_SIZE, PARTS, ModelPart
from mmevm.deployment.session import describe_missing_instructions
from mmevm.errors import ConfigError
from mmevm.inference import build_inferencer, check_images, find_inputs
from mmevm.inference.evaluation import WINDOWS, uses_windows
from mmevm.inference.model import describe_classes
from mmevm.inference.quantization import MAX_IMAGES, find_calibration_images, quantize_file
from mmevm.tables import format_table


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
        'outputs of the heads of a one-stage detector; detections: boxes, scores, labels and masks; of a segmentor, '
        'model: the logits at the size of the image, class_map: the class of each pixel '
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
    parser.add_argument(
        '--verify-images',
        nargs='+',
        default=[],
        metavar='IMAGE',
        help='images, folders or glob patterns on which the file must give the results of tools/infer.py',
    )
    parser.add_argument(
        '--precision',
        choices=['float32', 'int8'],
        default='float32',
        help='int8: convolutions and fully connected layers compute in int8, all else in float32 (default: float32)',
    )
    parser.add_argument(
        '--calibration',
        nargs='+',
        metavar='IMAGE',
        help='for int8, images on which the ranges of values are found: train, val or test for those of the config, or '
        f'images, folders or glob patterns; at most {MAX_IMAGES} are used',
    )
    parser.add_argument(
        '--max-drop',
        type=float,
        metavar='POINTS',
        help='for int8, write no file that loses more points of AP, top-1 accuracy or mIoU on the test split',
    )
    parser.add_argument(
        '--float-layers',
        nargs='+',
        default=[],
        metavar='NAME',
        help='for int8, layers to keep in float32; * is allowed',
    )
    parser.add_argument('--data-root', help='folder of the data; replaces data_root in all paths of the config')
    parser.add_argument('--opset', type=int, default=OPSET, help=f"version of ONNX's operators (default: {OPSET})")
    add_config_options(parser, note='; use model.backbone.deploy=True for a checkpoint saved in deploy mode')
    args = parser.parse_intermixed_args()  # options may stand between the three
    if args.out.suffix != '.onnx':
        parser.error(f'out={args.out}: expected a name that ends in .onnx, as the last argument.')
    if args.verify_images and not args.checkpoint:
        parser.error('--verify-images needs a checkpoint: random weights find nothing.')
    if args.shape and (len(args.shape) > 2 or min(args.shape) < 1):
        parser.error(f'--shape {args.shape}: expected a height and a width, or one side, in pixels.')
    if args.precision == 'int8' and not args.calibration:
        parser.error('--precision int8 needs --calibration: images to find the ranges of values, such as train.')
    if args.precision != 'int8' and (args.calibration or args.float_layers or args.max_drop is not None):
        parser.error('--calibration, --max-drop and --float-layers are for --precision int8.')
    if args.opset < OPSET:
        parser.error(f'--opset {args.opset}: expected {OPSET} or later.')
    return args


def load(part: ModelPart, checkpoint: str | None) -> Any:
    """Load a checkpoint, and return its content if it is one of the whole model."""
    if checkpoint and part.part != 'backbone':
        return load_strict(part.model, checkpoint)
    if checkpoint:
        load_pretrained(part.model.backbone, checkpoint)
    return {}


def deploy_copy(model: nn.Module) -> nn.Module:
    try:
        return deploy(copy.deepcopy(model))
    except (TypeError, ValueError) as error:
        raise ConfigError(f'{error} Use --no-deploy to export the model as it is.') from error


def name_of(source: str) -> str:
    """Return a URL or a file of a package as it is, and the name of a local file without its folder."""
    return source if ':' in source else Path(source).name


def quantize(
    source: Path, args: argparse.Namespace, cfg: Config, metadata: dict[str, str], images: Sequence[str]
) -> None:
    """Write the int8 version of a file and print what it cost."""
    shape = (args.shape[0], args.shape[-1]) if args.shape else (None, None)
    result = quantize_file(source, args.out, cfg, metadata, images, shape, args.float_layers, args.max_drop)
    print(f'{result.layers} layers in int8, calibrated on {result.images} images')
    print('layers with the largest errors, as signal-to-noise ratio in dB (noise of all layers up to this one):')
    rows = [(name, f'{ratio:.1f}') for name, ratio in list(result.errors.items())[:10]]
    print(format_table(('layer', 'dB'), rows))
    for name, (original, quantized) in result.metrics.items():
        print(f'{name}: {original:.4g} in float32, {quantized:.4g} in int8')
    if missing := describe_missing_instructions('int8'):
        print(f'WARNING: {missing}')


def main() -> None:
    args = parse_args()
    cfg = read_config(args.config)
    if args.data_root:
        cfg = replace_data_root(cfg, args.data_root)
    cfg.merge_from_dict(args.cfg_options or {})
    if args.precision == 'int8':  # report missing data before the export, which takes minutes
        calibration = find_calibration_images(cfg, args.calibration)
        if args.max_drop is not None:
            find_calibration_images(cfg, ['test'])
    torch.manual_seed(0)
    trained = ModelPart(build_without_weights(cfg), args.part)
    content = load(trained, args.checkpoint)
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
        'precision': args.precision,
        'strides': ' '.join(dict.fromkeys(name.partition('stride')[2] for name in names if 'stride' in name)),
        **describe_preprocessing(cfg),
        **trained.describe_results(),
    }
    if 'task' in metadata:
        metadata |= describe_classes(content, cfg, trained.model, args.checkpoint or args.config)
    if args.verify_images and trained.part == 'class_map':
        raise ConfigError(
            '--verify-images: part=class_map cannot give the results of tools/infer.py on images that are resized, '
            'because logits are resized with interpolation. Verify a file with --part model, or leave it out.'
        )
    if args.verify_images and uses_windows(cfg):
        raise ConfigError(f'--verify-images: {WINDOWS}')
    if args.verify_images or args.precision == 'int8':
        check_pipeline(metadata, str(args.out))
    if args.verify_images and 'task' not in metadata:
        raise ConfigError(f'--verify-images: part={trained.part} has no results to compare: leave it out.')
    images = find_inputs(args.verify_images).images
    if args.verify_images and not images:
        raise ConfigError(f'--verify-images {" ".join(args.verify_images)}: contains no image.')
    found = []

    def check(file: Path) -> float:
        if not images:
            return 0.0
        reference = build_inferencer(cfg, args.checkpoint, 'cpu')
        count, largest = check_images(str(file), reference, images, TOLERANCE)
        found.append(count)
        return largest

    part = ModelPart(deploy_copy(trained.model), trained.part) if args.deploy else trained
    constants = part.disable_score_threshold()
    trained.disable_score_threshold()
    size_divisor = int(metadata['pad_size_divisor'])
    folder = TemporaryDirectory(prefix='mmevm-export-')
    file = args.out if args.precision == 'float32' else Path(folder.name, args.out.name)
    check_folder(args.out)
    difference = export_onnx(
        part,
        file,
        part.lower_contrast(torch.randn(shape)),
        dynamic=not args.shape,
        size_divisor=size_divisor,
        output_names=names,
        metadata=metadata,
        opset=args.opset,
        reference=trained.reference(),
        compare=part.compare,
        constants=constants,
        check=check,
    )

    for name, value in metadata.items():
        print(f'{name}: {value}')
    sizes = '×'.join(map(str, shape)) if args.shape else f'batch×{channels}×height×width, any but channels'
    if size_divisor > 1 and not args.shape:
        sizes += f'; height and width are multiples of {size_divisor}'
    print(f'input: image, {sizes}')
    print(f'outputs: {", ".join(names)}')
    compared = ' and '.join(['noise', *(f'{len(images)} images with {count} results' for count in found)])
    print(f'compared with PyTorch on {compared}')
    print(f'largest difference from PyTorch, relative to the largest value of an output: {difference:.1e}')
    if args.precision == 'int8':
        quantize(file, args, cfg, metadata, calibration)
    folder.cleanup()
    if found == [0]:
        print('WARNING: nothing was found in the images of --verify-images, so they have verified little.')
    if uses_windows(cfg) and 'task' in metadata:
        print(f'WARNING: {WINDOWS}')
    if not args.checkpoint:
        print('WARNING: no checkpoint was given, so the weights are random: use the file to measure speed only.')
    print(f'wrote {args.out}')


if __name__ == '__main__':
    run(main)
