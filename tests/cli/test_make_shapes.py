"""Tests of tools/make_shapes.py: read the files back with pycocotools and OpenCV."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

SCRIPT = Path(__file__).parents[2] / 'tools' / 'make_shapes.py'
NUMBERS = dict(train=12, val=6)
SIZE = 96


def make(root, seed=0):
    numbers = [f'--num-{split}={number}' for split, number in NUMBERS.items()]
    subprocess.run([sys.executable, SCRIPT, root, *numbers, f'--size={SIZE}', f'--seed={seed}'], check=True)
    return {path.relative_to(root): path.read_bytes() for path in root.rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('shapes')
    make(root)
    return root


@pytest.fixture(params=NUMBERS)
def split(request):
    return request.param


@pytest.fixture
def coco(root, split):
    return COCO(root / 'annotations' / f'instances_{split}.json')


def test_files_depend_on_seed_only(root, tmp_path):
    files = {path.relative_to(root): path.read_bytes() for path in root.rglob('*') if path.is_file()}
    assert make(tmp_path / 'again') == files
    other = make(tmp_path / 'other', seed=1)
    assert set(other) == set(files)
    assert not set(other.values()) & set(files.values())


def test_all_images_differ(root):
    images = [path.read_bytes() for path in root.rglob('*.png')]
    assert len(set(images)) == len(images) == sum(NUMBERS.values())


def test_images_match_annotations(root, split, coco):
    assert len(coco.imgs) == NUMBERS[split]
    names = [image['file_name'] for image in coco.imgs.values()]
    assert sorted(names) == sorted(path.name for path in (root / split).iterdir())
    for image in coco.imgs.values():
        assert cv2.imread(str(root / split / image['file_name'])).shape == (image['height'], image['width'], 3)


def test_boxes_and_areas_match_masks(coco):
    assert coco.anns
    for ann in coco.anns.values():
        mask = coco.annToMask(ann)
        assert mask.shape == (SIZE, SIZE)
        rows, columns = np.nonzero(mask)
        left, top, width, height = ann['bbox']
        assert (left, top) == (columns.min(), rows.min())
        assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
        assert ann['area'] == len(rows)


def test_masks_do_not_overlap_and_some_touch_border(coco):
    cut = 0
    for image in coco.imgs:
        masks = [coco.annToMask(ann) for ann in coco.imgToAnns[image]]
        assert np.sum(masks, axis=0).max() <= 1
        cut += sum(mask[[0, -1]].any() or mask[:, [0, -1]].any() for mask in masks)
    assert cut


def test_first_image_has_a_crowd_and_last_image_is_empty(coco):
    first, *_, last = sorted(coco.imgs)
    assert [ann['image_id'] for ann in coco.anns.values() if ann['iscrowd']] == [first]
    assert coco.imgToAnns[last] == []
    assert all(coco.imgToAnns[image] for image in coco.imgs if image != last)


def test_categories(root, split, coco):
    assert [category['name'] for category in coco.cats.values()] == ['shape']
    assert {ann['category_id'] for ann in coco.anns.values()} == set(coco.cats)
    text = json.loads((root / 'annotations' / f'instances_{split}.json').read_text())
    assert len(coco.anns) == len(text['annotations'])  # no duplicate ids


def test_label_maps(tmp_path):
    numbers = [f'--num-{split}={number}' for split, number in NUMBERS.items()]
    subprocess.run([sys.executable, SCRIPT, tmp_path, *numbers, f'--size={SIZE}', '--label-maps'], check=True)
    coco = COCO(tmp_path / 'annotations/instances_train.json')
    seen = set()
    for image in coco.imgs.values():
        labels = cv2.imread(str(tmp_path / 'labels/train' / image['file_name']), cv2.IMREAD_UNCHANGED)
        objects = [(coco.annToMask(ann).astype(bool), ann['iscrowd']) for ann in coco.imgToAnns[image['id']]]
        masks = [mask for mask, _ in objects]
        assert np.array_equal(labels > 0, np.any([*masks, np.zeros_like(labels, bool)], axis=0))
        assert all(len(np.unique(labels[mask])) == 1 for mask in masks)  # each shape is of one kind
        assert all((labels[mask] == 1).all() for mask, is_crowd in objects if is_crowd)
        seen |= {*np.unique(labels).tolist()}
        # Disks and boxes have patterns of two colors that differ by 40 or more; without label maps, some hardly do.
        picture = cv2.imread(str(tmp_path / 'train' / image['file_name']))
        for mask in masks:
            if mask.sum() > 300 and labels[mask][0] in (1, 2):
                low, high = np.percentile(picture[mask], [10, 90], axis=0)
                assert (high - low).max() > 30
    assert seen == {0, 1, 2, 3}
    assert len(list((tmp_path / 'labels/val').iterdir())) == NUMBERS['val']


@pytest.mark.parametrize('crowd', [False, True])
@pytest.mark.parametrize('seed', range(5))
def test_masks_equal_visible_pixels(seed, crowd):
    """Use one plain color per texture, so that the pixels of the image identify the visible object."""
    module = runpy.run_path(str(SCRIPT))
    colors = iter(range(256))
    module['make_image'].__globals__['make_texture'] = lambda rng, size, kind: np.full(
        (size, size, 3), next(colors), np.uint8
    )
    image, objects = module['make_image'](np.random.default_rng(seed), SIZE, crowd=crowd, empty=False)
    assert len(objects) == image.max() > 0  # the background has the first color, 0
    for color, obj in enumerate(objects, start=1):
        assert obj['mask'].any()
        assert (obj['mask'] == (image[..., 0] == color)).all()
    assert sum(obj['iscrowd'] for obj in objects) == crowd
