"""Write scikit-learn's handwritten digits in ImageNet's folder layout: ``ROOT/{train,val}/{0..9}/*.png``.

1797 grey images of 8×8 pixels, by 43 people; each fifth image is held out. Same arguments, same files.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from sklearn.datasets import load_digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('root', type=Path, help='folder to write')
    args = parser.parse_args()
    digits = load_digits()
    counts = dict(train=0, val=0)
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = 'train' if i % 5 else 'val'
        folder = args.root / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(str(folder / f'{i:04d}.png'), np.uint8(image * 255 / 16)):
            raise OSError(f'{folder} cannot be written: is the disk full?')
        counts[split] += 1
    print(f'{args.root}: {counts["train"]} digits to train on, {counts["val"]} to evaluate on')


if __name__ == '__main__':
    main()
