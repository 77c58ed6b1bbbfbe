"""Write a COCO annotation file with the first images of another one, for example for an overfitting test."""

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('src', type=Path, help='COCO annotation file to read')
    parser.add_argument('dst', type=Path, help='COCO annotation file to write')
    parser.add_argument(
        '--num-images', type=int, default=16, help='number of images with objects, in the order of their ids'
    )
    args = parser.parse_args()

    if not args.src.is_file():
        parser.error(f'{args.src} does not exist.')
    coco = json.loads(args.src.read_text())
    with_objects = {ann['image_id'] for ann in coco['annotations'] if not ann['iscrowd']}
    images = sorted((img for img in coco['images'] if img['id'] in with_objects), key=lambda img: img['id'])
    if len(images) < args.num_images:
        parser.error(f'{args.src} has only {len(images)} images with objects, but --num-images is {args.num_images}.')
    coco['images'] = images[: args.num_images]
    kept = {img['id'] for img in coco['images']}
    coco['annotations'] = [ann for ann in coco['annotations'] if ann['image_id'] in kept]
    args.dst.parent.mkdir(parents=True, exist_ok=True)
    args.dst.write_text(json.dumps(coco))
    print(f'{args.dst}: {len(coco["images"])} images, {len(coco["annotations"])} objects')


if __name__ == '__main__':
    main()
