"""Write a small synthetic dataset in COCO format: textured shapes on a textured background.

Disks, boxes and triangles of one class, 'shape', occlude each other and may be cut by the image border. Masks contain
the visible pixels only. In the first image of each split, a cluster of disks is annotated as a crowd. The last image of
each split has no objects. The same arguments give the same files.

With --label-maps, PNG files for semantic segmentation hold the kind of shape of each pixel, and each kind has a texture
of its own: disks are striped, boxes checkered, triangles graded, and the background is cloudy.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as mask_utils

KINDS = ('disk', 'box', 'triangle')
TEXTURES = ('gradient', 'checkerboard', 'stripes', 'clouds')
TEXTURE_OF_KIND = dict(disk='stripes', box='checkerboard', triangle='gradient', background='clouds')


def make_texture(rng: np.random.Generator, size: int, kind: str, contrast: tuple[int, int] = (0, 70)) -> np.ndarray:
    """Return a pattern of two similar random colors, (size, size, 3) uint8.

    ``kind`` is one of TEXTURES; ``contrast`` is the range of the difference between the colors, in each channel.
    """
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
    color, change = rng.uniform(30, 225, 3), rng.uniform(-1, 1, 3)
    low, high = contrast
    change = np.sign(change) * (low + np.abs(change) * (high - low))
    texture = color + (np.asarray(mix, np.float32)[..., None] - 0.5) * change
    return np.clip(texture + rng.normal(0, 6, texture.shape), 0, 255).astype(np.uint8)


def make_shape(rng: np.random.Generator, size: int, kind: str, radius: float, center: np.ndarray) -> np.ndarray:
    """Return the mask of one shape, (size, size) bool."""
    mask = np.zeros((size, size), np.uint8)
    if kind == 'disk':
        cv2.circle(mask, center.astype(int).tolist(), int(radius), 1, -1)
    else:
        corners = 4 if kind == 'box' else 3
        angles = rng.uniform(0, 2 * np.pi) + np.arange(corners) * 2 * np.pi / corners
        points = center + 1.2 * radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        cv2.fillPoly(mask, [points.astype(np.int32)], 1)
    return mask.astype(bool)


def make_image(
    rng: np.random.Generator, size: int, crowd: bool, empty: bool, texture_by_kind: bool = False
) -> tuple[np.ndarray, list[dict]]:
    """Return an image, (size, size, 3) uint8, and its objects.

    Objects are dicts with ``mask`` (visible pixels), ``kind`` (one of KINDS) and ``iscrowd``.
    """

    def texture(kind: str) -> np.ndarray:
        if texture_by_kind:
            return make_texture(rng, size, TEXTURE_OF_KIND[kind], contrast=(40, 100))
        return make_texture(rng, size, rng.choice(TEXTURES))

    def add_shape(shape: dict) -> None:
        """Paint a shape on the image and remove its pixels from the masks of the earlier shapes."""
        image[shape['mask']] = texture(shape['kind'])[shape['mask']]
        for below in shapes:
            below['mask'] = below['mask'] & ~shape['mask']
        shapes.append(shape)

    image = texture('background')
    shapes: list[dict] = []
    if crowd:
        center = rng.uniform(0.3, 0.7, 2) * size
        disks = [make_shape(rng, size, 'disk', size / 32, center + rng.normal(0, size / 12, 2)) for _ in range(12)]
        add_shape(dict(iscrowd=1, kind='disk', mask=np.any(disks, axis=0)))
    for _ in range(0 if empty else rng.integers(2, 5)):
        radius = np.exp(rng.uniform(np.log(size / 9), np.log(size / 3.6)))
        kind = rng.choice(KINDS)
        mask = make_shape(rng, size, kind, radius, rng.uniform(0.1, 0.9, 2) * size)
        # Skip a shape that would hide too much of another one.
        if all((shape['mask'] & mask).sum() < 0.4 * shape['mask'].sum() for shape in shapes):
            add_shape(dict(iscrowd=0, kind=kind, mask=mask))
    return image, shapes


def write_image(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), image):
        raise OSError(f'Cannot write {path}. Check that the disk is not full.')


def make_split(root: Path, split: str, num_images: int, size: int, seed: int, label_maps: bool = False) -> None:
    """Write ``root/split/*.png`` and ``root/annotations/instances_split.json``.

    With ``label_maps``, also write ``root/labels/split/*.png``: 0 for the background, then the index in KINDS plus 1.
    """
    rng = np.random.default_rng(seed)
    (root / 'annotations').mkdir(parents=True, exist_ok=True)
    coco = dict(
        info=dict(description=f'Synthetic shapes, made by {Path(__file__).name} from seed {seed}'),
        images=[],
        annotations=[],
        categories=[dict(id=1, name='shape')],
    )
    for i in range(num_images):
        image, objects = make_image(rng, size, i == 0, i == num_images - 1, texture_by_kind=label_maps)
        name = f'{i:06d}.png'
        write_image(root / split / name, image)
        if label_maps:
            labels = np.zeros((size, size), np.uint8)
            for obj in objects:
                labels[obj['mask']] = KINDS.index(obj['kind']) + 1
            write_image(root / 'labels' / split / name, labels)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('root', type=Path, help='output folder')
    parser.add_argument('--num-train', type=int, default=800, help='number of training images')
    parser.add_argument('--num-val', type=int, default=80, help='number of validation images')
    parser.add_argument('--size', type=int, default=192, help='height and width of the images in pixels')
    parser.add_argument('--seed', type=int, default=0, help='random seed')
    parser.add_argument('--label-maps', action='store_true', help='also write label maps for semantic segmentation')
    args = parser.parse_args()
    make_split(args.root, 'train', args.num_train, args.size, 2 * args.seed, args.label_maps)
    make_split(args.root, 'val', args.num_val, args.size, 2 * args.seed + 1, args.label_maps)
    print(f'{args.root}: {args.num_train} training images and {args.num_val} validation images')


if __name__ == '__main__':
    main()
