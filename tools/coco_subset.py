"""Write a COCO annotation file with the first images of another one, for example for an overfitting test.

--label-maps FOLDER also writes what a segmentor needs. FOLDER/labels/ has a PNG file for each image, in which a pixel
is 0 for the background, 1 to N for the classes and 255 (ignored) in crowds. Of objects that overlap, the smaller one is
kept. FOLDER/images.txt has the names of the images without suffix, FOLDER/classes.txt those of the classes.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
from pycocotools.coco import COCO


def write_label_maps(ann_file: Path, folder: Path) -> None:
    coco = COCO(ann_file)
    label_of = {category: label for label, category in enumerate(coco.getCatIds(), start=1)}
    (folder / 'labels').mkdir(parents=True, exist_ok=True)
    names = []
    for image in coco.loadImgs(coco.getImgIds()):
        labels = np.zeros((image['height'], image['width']), np.uint8)
        anns = coco.loadAnns(coco.getAnnIds(image['id']))
        for ann in sorted(anns, key=lambda ann: (not ann['iscrowd'], -ann['area'])):
            labels[coco.annToMask(ann) > 0] = 255 if ann['iscrowd'] else label_of[ann['category_id']]
        names.append(Path(image['file_name']).stem)
        path = folder / 'labels' / f'{names[-1]}.png'
        if not cv2.imwrite(str(path), labels):
            raise OSError(f'Cannot write {path}. Check that the disk is not full.')
    classes = ['background', *(category['name'] for category in coco.loadCats(list(label_of)))]
    (folder / 'images.txt').write_text('\n'.join(names) + '\n')
    (folder / 'classes.txt').write_text('\n'.join(classes) + '\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', type=Path, help='COCO annotation file to read')
    parser.add_argument('dst', type=Path, help='COCO annotation file to write')
    parser.add_argument(
        '--num-images', type=int, default=16, help='number of images with objects, in the order of their ids'
    )
    parser.add_argument('--label-maps', type=Path, metavar='FOLDER', help='write label maps for segmentation too')
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
    if args.label_maps:
        write_label_maps(args.dst, args.label_maps)


if __name__ == '__main__':
    main()
