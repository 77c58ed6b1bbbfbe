"""Convert a checkpoint of EfficientViM to the names of mmevm: ``python tools/convert_checkpoint.py SRC DST``."""

import argparse

from mmengine.runner.checkpoint import save_checkpoint

import mmevm.engine  # noqa: F401, registers the atomic backend
from mmevm.checkpoints import convert_checkpoint, fetch_checkpoint, prefix_errors
from mmevm.cli import run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('src', help='a file of the authors, timm or mmevm, a URL or a timm:// name')
    parser.add_argument('dst', help='the file to write, such as efficientvim_m4.pth')
    parser.add_argument(
        '--weights', choices=['ema', 'model'], help='weights to take from a file that has both (default: ema)'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    content = fetch_checkpoint(args.src)
    with prefix_errors(args.src):
        checkpoint, report = convert_checkpoint(content, args.weights)
    save_checkpoint(checkpoint, args.dst, backend_args=dict(backend='mmevm.atomic'))
    print(report)
    print(f'written: {args.dst}')


if __name__ == '__main__':
    run(main)
