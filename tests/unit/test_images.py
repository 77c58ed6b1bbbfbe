"""Unusual image files are read as three channels of bytes; unreadable ones are named in the error."""

import json

import cv2
import numpy as np
import pytest
from command_line import ROOT
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from mmevm.checks.data import summarize
from mmevm.cli import replace_data_root

SIDE = 64
SQUARE = [[10, 10, 40, 10, 40, 40, 10, 40]]
DEMO = Config.fromfile(ROOT / 'configs/demo/maskrcnn_evm_m1_shapes.py')


def image(id_, **changes):
    return dict(id=id_, file_name=f'{id_}.png', width=SIDE, height=SIDE) | changes


def annotation(id_, image_id=1, **changes):
    box = dict(bbox=[10, 10, 30, 30], area=900, iscrowd=0, segmentation=SQUARE)
    return dict(id=id_, image_id=image_id, category_id=1) | box | changes


def write(root, images, annotations, categories=({'id': 1, 'name': 'shape'}, {'id': 7, 'name': 'other'}), files=True):
    """Write the dataset that the demo's config reads for training and evaluation."""
    for split in ('train', 'val'):
        (root / split).mkdir(exist_ok=True)
        for entry in images if files else ():
            path = root / split / entry['file_name']
            if not path.exists():
                cv2.imwrite(str(path), np.full((entry['height'], entry['width'], 3), 127, np.uint8))
    (root / 'annotations').mkdir(exist_ok=True)
    whole = dict(images=list(images), annotations=list(annotations), categories=list(categories))
    for split in ('train', 'val'):
        (root / f'annotations/instances_{split}.json').write_text(json.dumps(whole))


def read(root, **changes):
    cfg = replace_data_root(DEMO, str(root))
    cfg.train_dataloader.dataset.update(changes)
    return cfg


def build(cfg):
    init_default_scope('mmdet')
    return DATASETS.build(cfg.train_dataloader.dataset)


def save(path, mode, size=(SIDE, SIDE), **arguments):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], len(mode)), np.uint8)
    Image.frombytes(mode, size, pixels.tobytes()).save(path, **arguments)


def save_sixteen_bits(path):
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 2**16, (SIDE, SIDE, 3), np.uint16))


def save_rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90°
    save(path, 'RGB', (SIDE // 2, SIDE), exif=exif)


STRANGE = [
    ('1.jpg', lambda path: save(path, 'CMYK'), (SIDE, SIDE)),
    ('1.jpg', lambda path: save(path, 'L'), (SIDE, SIDE)),
    ('1.png', lambda path: save(path, 'L'), (SIDE, SIDE)),
    ('1.png', lambda path: save(path, 'LA'), (SIDE, SIDE)),
    ('1.png', lambda path: save(path, 'RGBA'), (SIDE, SIDE)),
    ('1.png', save_sixteen_bits, (SIDE, SIDE)),
    ('1.png', lambda path: save(path, 'RGB', (300, 1)), (300, 1)),
    ('1.png', lambda path: save(path, 'RGB', (1, 300)), (1, 300)),
    ('1.png', lambda path: save(path, 'RGB', (1, 1)), (1, 1)),
    ('1.jpg', save_rotated, (SIDE, SIDE // 2)),
]


@pytest.mark.parametrize(('name', 'make', 'size'), STRANGE)
def test_unusual_images_are_read(tmp_path, name, make, size):
    """Images have three channels of bytes and are rotated by their EXIF tag; annotations refer to the rotated image."""
    width, height = size
    (tmp_path / 'train').mkdir()
    make(tmp_path / 'train' / name)
    box = dict(bbox=[0, 0, width, height], area=width * height, segmentation=[[0, 0, width, 0, width, height]])
    write(tmp_path, [image(1, file_name=name, width=width, height=height)], [annotation(1, **box)], files=False)
    cfg = read(tmp_path, filter_cfg=None)
    assert summarize('train', build(cfg), training=True).objects.total() == 1
    if 1 in size:  # mmdet cannot pack a flipped row of pixels
        (flip,) = (step for step in cfg.train_dataloader.dataset.pipeline if step.type == 'RandomFlip')
        flip.prob = 0.0
    packed = build(cfg)[0]
    scale = 192 / max(size)
    expected = (3, max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1))
    assert packed['inputs'].shape in (expected, (3, expected[2], expected[1]))  # flipped diagonally
    assert str(packed['inputs'].dtype) == 'torch.uint8'
    assert len(packed['data_samples'].gt_instances) == 1


@pytest.mark.parametrize('content', ['text', 'half'])
@pytest.mark.parametrize('name', ['1.png', '1.jpg'])
def test_unreadable_image_is_named(tmp_path, name, content):
    write(tmp_path, [image(1, file_name=name)], [annotation(1)])
    path = tmp_path / 'train' / name
    save(path, 'RGB')
    whole = path.read_bytes()
    path.write_bytes(dict(text=b'no image', half=whole[: len(whole) // 2])[content])
    dataset = build(read(tmp_path))
    with pytest.raises(AssertionError, match=f'failed to load image: {tmp_path}/train/{name}'):
        dataset[0]
