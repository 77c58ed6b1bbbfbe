"""Write scikit-learn's handwritten digits in the folder layout of ImageNet: ``ROOT/{train,val}/{0..9}/*.png``.

The dataset has 1797 gray images of 8×8 pixels, written by 43 people. Every fifth image belongs to the validation set.
"""

import argparse
from pathlib import Path

import cv2
import numpy as np
from sklearn.datasets import load_digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('root', type=Path, help='output folder')
    args = parser.parse_args()
    digits = load_digits()
    counts = dict(train=0, val=0)
    for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = 'train' if i % 5 else 'val'
        folder = args.root / split / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        name = f'{i:04d}.png'
        if not cv2.imwrite(str(folder / name), np.uint8(image * 255 / 16)):
            raise OSError(f'Cannot write {folder / name}. Check that the disk is not full.')
        counts[split] += 1
    print(f'{args.root}: {counts["train"]} training images and {counts["val"]} validation images')


if __name__ == '__main__':
    main()
