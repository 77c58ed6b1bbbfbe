"""Convert a checkpoint of EfficientViM into mmevm's names: ``python tools/convert_checkpoint.py SRC DST``."""

import argparse
import os
from pathlib import Path

import torch

from mmevm.checkpoints import convert_checkpoint, fetch_checkpoint, prefix_errors
from mmevm.cli import run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('src', help="a file of the authors', of timm's or of mmevm's, a URL or a timm:// name")
    parser.add_argument('dst', type=Path, help='the file to write, such as efficientvim_m4.pth')
    parser.add_argument(
        '--weights',
        choices=['ema', 'model'],
        help="what to take from a file that has both (default: 'ema' if it is there)",
    )
    return parser.parse_args()


def save(checkpoint: dict, path: Path) -> None:
    """Write the whole file or none: a run that is stopped leaves no half of it behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        torch.save(checkpoint, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> None:
    args = parse_args()
    content = fetch_checkpoint(args.src)
    with prefix_errors(args.src):
        checkpoint, report = convert_checkpoint(content, args.weights)
    save(checkpoint, args.dst)
    print(report)
    print(f'written: {args.dst}')


if __name__ == '__main__':
    run(main)
