"""Write a small synthetic data set in COCO's layout: textured shapes on textured grounds.

Discs, boxes and triangles of one class, 'shape', occlude each other and are cut by the border; masks hold exactly the
pixels that are visible. In the first image of each split a cluster of discs is annotated as one crowd, and the last
image is empty. Same arguments, same pixels.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as mask_utils

KINDS = ('disc', 'box', 'triangle')
TEXTURES = ('gradient', 'checkerboard', 'stripes', 'clouds')


def make_texture(rng: np.random.Generator, size: int, kind: str) -> np.ndarray:
    """A random colour and one akin to it, mixed as TEXTURES say: (size, size, 3) uint8."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), rng.uniform(8, 18)
    across = x * np.cos(angle) + y * np.sin(angle)
    along = y * np.cos(angle) - x * np.sin(angle)
    if kind == 'stripes':
        mix = np.sin(across * 2 * np.pi / period) > 0
    elif kind == 'checkerboard':
        mix = (np.floor(across / period * 2) + np.floor(along / period * 2)) % 2
    elif kind == 'gradient':
        mix = (across - across.min()) / np.ptp(across)
    else:
        mix = cv2.resize(rng.random((8, 8), dtype=np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    colour, change = rng.uniform(30, 225, 3), rng.uniform(-70, 70, 3)
    texture = colour + (np.asarray(mix, np.float32)[..., None] - 0.5) * change
    return np.clip(texture + rng.normal(0, 6, texture.shape), 0, 255).astype(np.uint8)


def make_shape(rng: np.random.Generator, size: int, kind: str, radius: float, centre: np.ndarray) -> np.ndarray:
    """Mask of one shape, (size, size) bool."""
    mask = np.zeros((size, size), np.uint8)
    if kind == 'disc':
        cv2.circle(mask, centre.astype(int).tolist(), int(radius), 1, -1)
    else:
        corners = 4 if kind == 'box' else 3
        angles = rng.uniform(0, 2 * np.pi) + np.arange(corners) * 2 * np.pi / corners
        points = centre + 1.2 * radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        cv2.fillPoly(mask, [points.astype(np.int32)], 1)
    return mask.astype(bool)


def make_image(rng: np.random.Generator, size: int, crowd: bool, empty: bool) -> tuple[np.ndarray, list[dict]]:
    """One image and its objects: ``mask`` (visible pixels) and ``iscrowd``."""
    image = make_texture(rng, size, rng.choice(TEXTURES))
    shapes = []
    if crowd:
        centre = rng.uniform(0.3, 0.7, 2) * size
        discs = [make_shape(rng, size, 'disc', size / 32, centre + rng.normal(0, size / 12, 2)) for _ in range(12)]
        add_shape(rng, image, shapes, dict(iscrowd=1, mask=np.any(discs, axis=0)))
    for _ in range(0 if empty else rng.integers(2, 5)):
        radius = np.exp(rng.uniform(np.log(size / 9), np.log(size / 3.6)))
        mask = make_shape(rng, size, rng.choice(KINDS), radius, rng.uniform(0.1, 0.9, 2) * size)
        # A shape of which almost nothing is left could not be told from another.
        if all((shape['mask'] & mask).sum() < 0.4 * shape['mask'].sum() for shape in shapes):
            add_shape(rng, image, shapes, dict(iscrowd=0, mask=mask))
    return image, shapes


def add_shape(rng: np.random.Generator, image: np.ndarray, shapes: list[dict], shape: dict) -> None:
    """Paint a shape over what is there, and take it out of the masks below."""
    image[shape['mask']] = make_texture(rng, len(image), rng.choice(TEXTURES))[shape['mask']]
    for below in shapes:
        below['mask'] = below['mask'] & ~shape['mask']
    shapes.append(shape)


def make_split(root: Path, split: str, num_images: int, size: int, seed: int) -> None:
    """Write ``root/split/*.png`` and ``root/annotations/instances_split.json``."""
    rng = np.random.default_rng(seed)
    (root / split).mkdir(parents=True, exist_ok=True)
    (root / 'annotations').mkdir(exist_ok=True)
    coco = dict(
        info=dict(description=f'Synthetic shapes, made by {Path(__file__).name} from seed {seed}'),
        images=[],
        annotations=[],
        categories=[dict(id=1, name='shape')],
    )
    for i in range(num_images):
        image, objects = make_image(rng, size, crowd=i == 0, empty=i == num_images - 1)
        name = f'{i:06d}.png'
        if not cv2.imwrite(str(root / split / name), image):
            raise OSError(f'{root / split / name} cannot be written: is the disk full?')
        coco['images'].append(dict(id=i + 1, file_name=name, width=size, height=size))
        for obj in objects:
            rle = mask_utils.encode(np.asfortranarray(obj['mask'], np.uint8))
            coco['annotations'].append(
                dict(
                    id=len(coco['annotations']) + 1,
                    image_id=i + 1,
                    category_id=1,
                    iscrowd=obj['iscrowd'],
                    area=int(mask_utils.area(rle)),
                    bbox=mask_utils.toBbox(rle).tolist(),
                    segmentation=dict(size=rle['size'], counts=rle['counts'].decode()),
                )
            )
    (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('root', type=Path, help='folder to write')
    parser.add_argument('--num-train', type=int, default=800, help='images to train on')
    parser.add_argument('--num-val', type=int, default=80, help='images to evaluate on')
    parser.add_argument('--size', type=int, default=192, help='side of the images in pixels')
    parser.add_argument('--seed', type=int, default=0, help='seed of the generator')
    args = parser.parse_args()
    make_split(args.root, 'train', args.num_train, args.size, 2 * args.seed)
    make_split(args.root, 'val', args.num_val, args.size, 2 * args.seed + 1)
    print(f'{args.root}: {args.num_train} synthetic images to train on, {args.num_val} to evaluate on')


if __name__ == '__main__':
    main()
