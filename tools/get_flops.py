"""Count the parameters and FLOPs of a config's model: a classifier, a detector or a segmentor.

FLOPs are multiply-accumulates as fvcore counts them and papers report them: those of convolutions, linear layers and
matrix products, a few per element of norms, interpolation and average pooling, and none for other elementwise
operations. No weights are loaded or downloaded.
"""

import argparse

import torch

from mmevm.analysis import build_without_weights, default_input_size, measure_complexity, padded_size
from mmevm.cli import add_config_options, read_config, run
from mmevm.errors import ConfigError


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file, or a config of a package such as mmdet::retinanet/….py')
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        metavar='PIXELS',
        help="height and width of the image, or the side of a square (default: from the config's test pipeline)",
    )
    parser.add_argument('--depth', type=int, default=2, help='levels of nested modules in the table (default: 2)')
    parser.add_argument('--backbone-only', action='store_true', help='leave out neck and heads')
    add_config_options(parser)
    args = parser.parse_args()
    if args.shape and (len(args.shape) > 2 or min(args.shape) < 1):
        parser.error(f'--shape {args.shape}: pass a height and a width, or one side, in pixels.')
    if args.depth < 0:
        parser.error(f'--depth must be 0 or more, not {args.depth}.')
    return args


def format_counts(counts: dict[str, int], unit: float = 1, digits: int = 0) -> str:
    return ', '.join(f'{name} {count / unit:,.{digits}f}' for name, count in sorted(counts.items()))


def main() -> None:
    args = parse_args()
    cfg = read_config(args.config)
    cfg.merge_from_dict(args.cfg_options or {})
    torch.manual_seed(0)
    model = build_without_weights(cfg)
    size, origin = (tuple(args.shape), 'as requested') if args.shape else default_input_size(cfg)
    size = size * 2 if len(size) == 1 else size
    height, width = padded_size(model, size)
    if (height, width) != size:
        origin += f', {size[0]}×{size[1]}, padded by the data preprocessor'
    if args.backbone_only:
        if not hasattr(model, 'backbone'):
            raise ConfigError(
                f'--backbone-only: {type(model).__name__} of {args.config} has no backbone. Omit --backbone-only.'
            )
        model = model.backbone
    channels = cfg.model.get('backbone', {}).get('in_channels', 3)
    complexity = measure_complexity(model, (1, channels, height, width))

    print(complexity.table(args.depth))
    print(f'Input: {"×".join(map(str, complexity.input_shape))} ({origin})')
    print(f'MFLOPs by operator: {format_counts(complexity.by_operator, 1e6, 2)}')
    if complexity.rois:
        print(f'RoIs for which the RoI heads are counted: {format_counts(complexity.rois)}')
    if complexity.elementwise:
        print(f'Not counted by convention, elementwise (calls): {format_counts(complexity.elementwise)}')
    if complexity.unknown:
        print(f'UNKNOWN operators, missing in the FLOPs (calls): {format_counts(complexity.unknown)}')
    if complexity.uncalled:
        print(f'Modules with parameters that are never called: {", ".join(complexity.uncalled)}')
    print(
        f'{type(model).__name__}: {complexity.params / 1e6:.6f} M parameters, {complexity.flops / 1e6:.2f} MFLOPs '
        f'(multiply-accumulates) for an image of {height}×{width}'
    )


if __name__ == '__main__':
    run(main)
