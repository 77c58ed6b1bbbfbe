"""Look at the data of a detector's config before training: counts, sizes and pictures.

Prints objects per class, images without objects, and the sizes of objects beside the detector's strides and anchors.
Writes pictures with the annotations as they are in the files (left) and as the training pipeline makes them (right).
"""

import argparse
from pathlib import Path

from rich.console import Console

from mmevm.cli import add_config_options, read_config, replace_data_root, run


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file of a detector')
    parser.add_argument('--split', choices=['train', 'val', 'test'], default='train', help='default: train')
    parser.add_argument('--out-dir', type=Path, help='folder for pictures (default: browse/CONFIG_NAME/SPLIT)')
    parser.add_argument('--num-images', type=int, default=16, help='number of pictures; 0 for none (default: 16)')
    parser.add_argument('--data-root', help='folder of the data; replaces data_root in all paths of the config')
    add_config_options(parser)
    args = parser.parse_args()
    if args.num_images < 0:
        parser.error(f'--num-images {args.num_images}: expected 0 or more.')
    return args


def main() -> None:
    args = parse_args()
    from mmevm.analysis.dataset import DatasetBrowser  # takes seconds; --help does not need it

    cfg = read_config(args.config)
    if args.data_root:
        cfg = replace_data_root(cfg, args.data_root)
    cfg.merge_from_dict(args.cfg_options or {})
    browser = DatasetBrowser(cfg, args.split)
    Console().print(browser.tables())
    if args.num_images:
        out_dir = args.out_dir or Path('browse', Path(args.config).stem, args.split)
        paths = browser.draw(out_dir, args.num_images)
        print(f'{len(paths)} pictures in {out_dir}')


if __name__ == '__main__':
    run(main)
