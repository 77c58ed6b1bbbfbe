"""tools/browse_dataset.py: counts and sizes as in the files, and pictures of both views of an image."""

import json

import cv2
import numpy as np
import pytest
import torch
from command_line import ROOT, run_here
from mmengine.config import Config
from rich.console import Console
from torchvision.ops import box_iou

from mmevm.analysis.dataset import DatasetBrowser
from mmevm.cli import replace_data_root
from mmevm.errors import ConfigError

SHAPES = ROOT / 'configs/demo/maskrcnn_evm_m1_shapes.py'
TOOL = ROOT / 'tools/browse_dataset.py'
# Of each image: width, height, and its boxes as x, y, width, height. The pipelines resize images to 192 pixels.
IMAGES = [
    (96, 96, [[10, 20, 40, 30]]),
    (96, 48, [[8, 8, 16, 9], [30, 10, 4, 4], [50, 10, 30, 30]]),
    (192, 192, []),
    (192, 96, [[0, 0, 192, 96]]),
]
SCALES = [2, 2, 1, 1]


def write(root):
    """Write gray images and their annotations in COCO format. The last annotation of the second image is a crowd."""
    images, annotations = [], []
    for split in ('train', 'val'):
        (root / split).mkdir(parents=True)
    for number, (width, height, boxes) in enumerate(IMAGES):
        name = f'image{number}.png'
        images.append(dict(id=number, file_name=name, width=width, height=height))
        for split in ('train', 'val'):
            cv2.imwrite(str(root / split / name), np.full((height, width, 3), 127, np.uint8))
        for x, y, w, h in boxes:
            square = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotation = dict(bbox=[x, y, w, h], area=w * h, iscrowd=0, segmentation=[square])
            annotations.append(dict(annotation, id=len(annotations) + 1, image_id=number, category_id=1))
    rle = dict(counts=[0, IMAGES[1][0] * IMAGES[1][1]], size=[IMAGES[1][1], IMAGES[1][0]])
    annotations[3].update(iscrowd=1, segmentation=rle)
    categories = [dict(id=1, name='shape'), dict(id=2, name='other')]
    (root / 'annotations').mkdir()
    for split in ('train', 'val'):
        coco = dict(images=images, annotations=annotations, categories=categories)
        (root / f'annotations/instances_{split}.json').write_text(json.dumps(coco))
    return root


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write(tmp_path_factory.mktemp('data'))


@pytest.fixture
def cfg(data):
    cfg = replace_data_root(Config.fromfile(SHAPES), str(data))
    cfg.train_dataloader.dataset.filter_cfg = None  # keeps the image without objects
    cfg.train_dataloader.dataset.pipeline[3].prob = 0.0  # of flips
    return cfg


def text_of(browser):
    console = Console(width=200)
    with console.capture() as capture:
        console.print(browser.tables())
    return capture.get()


def row_of(text, name):
    (row,) = (line for line in text.splitlines() if line.startswith(f'│ {name} '))
    return [cell.strip() for cell in row.strip('│').split('│')]


def test_tables(cfg):
    cfg.train_dataloader.dataset.metainfo.classes = ('shape', 'other')
    text = text_of(DatasetBrowser(cfg))
    boxes = [(w, h, scale) for (_, _, boxes), scale in zip(IMAGES, SCALES, strict=True) for _, _, w, h in boxes]
    del boxes[3]  # the crowd
    sizes = [(w * h) ** 0.5 for w, h, _ in boxes]
    resized = [(w * h) ** 0.5 * scale for w, h, scale in boxes]
    quantiles = [f'{value:.0f}' for value in (*np.quantile(sizes, [0.1, 0.5, 0.9]), np.median(resized))]
    assert row_of(text, 'shape') == ['shape', '4', '3', *quantiles]
    assert 'classes without objects: other' in text
    assert 'images without objects: 1 of 4: image2.png' in text
    assert '4 objects; objects to ignore: 1' in text
    assert '96×96 (1, ×2.00), 96×48 (1, ×2.00), 192×192 (1, ×1.00), 192×96 (1, ×1.00)' in text
    table = [row_of(text, name) for name in ('   8–16', '  16–32', '  32–64', ' 64–128', '128–256')]
    assert [row[1:3] for row in table] == [
        ['1', '25.0%'],
        ['1', '25.0%'],
        ['0', '0.0%'],
        ['1', '25.0%'],
        ['1', '25.0%'],
    ]


def test_anchors(cfg):
    """The share of objects with an anchor that overlaps them: by torchvision, of boxes around the origin."""
    browser = DatasetBrowser(cfg)
    anchors = torch.tensor(
        [
            [-w / 2, -h / 2, w / 2, h / 2]
            for stride in (4, 8, 16, 32, 64)
            for w, h in [(8 * stride / ratio**0.5, 8 * stride * ratio**0.5) for ratio in (0.5, 1, 2)]
        ]
    )
    half = torch.from_numpy(browser.scaled) / 2
    overlaps = box_iou(torch.cat([-half, half], dim=1).float(), anchors).amax(dim=1)
    text = ' '.join(text_of(browser).split())
    assert 'model.rpn_head: anchors at strides 4, 8, 16, 32, 64; sizes 32 to 512 pixels; ' in text
    assert f'{(overlaps >= 0.5).float().mean():.1%} of the objects overlap a centered anchor with IoU ≥ 0.5' in text
    assert '0.0% of the objects are smaller than the finest stride, 0.0% than twice that' in text


def test_points(cfg):
    cfg.model = Config.fromfile(ROOT / 'configs/rtmdet/rtmdet_evm_m1.py').model
    text = ' '.join(text_of(DatasetBrowser(cfg)).split())
    assert (
        'model.bbox_head: points at strides 8, 16, 32; 0.0% of the objects are smaller than the finest stride' in text
    )
    assert '25.0% than twice that' in text


def colored(picture):
    """Return left, top, right and bottom of the pixels that are not gray."""
    rows, columns = np.nonzero(np.ptp(picture.astype(int), axis=2) > 60)
    return np.array([columns.min(), rows.min(), columns.max(), rows.max()])


def test_pictures(monkeypatch, data, tmp_path, capsys):
    """On the left the file, on the right the training pipeline, which makes the image twice as large."""
    monkeypatch.chdir(tmp_path)
    options = ['visualizer.line_width=1', 'train_dataloader.dataset.pipeline.3.prob=0.0']
    run_here(monkeypatch, TOOL, SHAPES, '--data-root', data, '--num-images', 2, '--cfg-options', *options)
    folder = tmp_path / 'browse/maskrcnn_evm_m1_shapes/train'
    assert sorted(path.name for path in folder.iterdir()) == ['000000_image0.jpg', '000002_image3.jpg']
    assert '2 pictures in browse/maskrcnn_evm_m1_shapes/train' in capsys.readouterr().out
    picture = cv2.imread(str(folder / '000000_image0.jpg'))
    assert picture.shape == (192, 96 + 8 + 192, 3)
    box = np.array([10, 20, 50, 50])
    assert np.abs(colored(picture[:96, :96]) - box).max() <= 2
    assert np.abs(colored(picture[:, 104:]) - 2 * box).max() <= 4
    assert (picture[97:, :96] > 250).all()  # nothing is below the smaller half


def test_pictures_of_validation_data(cfg, tmp_path):
    """They have no right half: the test pipeline does not change annotations."""
    (path,) = DatasetBrowser(cfg, 'val').draw(tmp_path, 1)
    assert cv2.imread(str(path)).shape == (96, 96, 3)


def test_unsuitable_configs(cfg):
    with pytest.raises(ConfigError, match=r"default_scope='mmpretrain' .* Give the config of a detector"):
        DatasetBrowser(Config.fromfile(ROOT / 'configs/demo/efficientvim-m1_digits.py'))
    cfg.test_dataloader.dataset.ann_file = 'none.json'
    with pytest.raises(ConfigError, match=r'^test_dataloader\.dataset cannot be read: .*none\.json does not exist'):
        DatasetBrowser(cfg, 'test')
    cfg.val_dataloader.dataset.metainfo.classes = ('other',)
    with pytest.raises(ConfigError, match=r'^val_dataloader\.dataset: no image has an object'):
        DatasetBrowser(cfg, 'val')
    cfg.train_dataloader.dataset.metainfo.classes = ('Shape',)
    with pytest.raises(ConfigError, match='no object is annotated as Shape'):
        DatasetBrowser(cfg)
