"""configs/examples: copies of them train on data in COCO, Pascal VOC and YOLO format after a few edits at their top."""

import json
import re
import xml.etree.ElementTree as ET

import cv2
import numpy as np
import pytest
import torch
from command_line import ROOT, run_here, scalars
from mmengine.config import Config
from mmengine.optim import CosineAnnealingLR, LinearLR
from mmengine.registry import DATASETS, init_default_scope

from mmevm.checks import check_config

EXAMPLES = ROOT / 'configs/examples'
FORMATS = ['coco', 'voc', 'yolo']
SIDE = 64
# Of each image, its objects as class and x1, y1, x2, y2 in pixels, without the last row and column.
OBJECTS = {'a': [('cell', (8, 8, 40, 32))], 'b': [('plate', (16, 4, 60, 50)), ('cell', (1, 30, 20, 63))]}


def copy_with(folder, name, **values):
    """Write a copy of an example with other values at its top, as a user would, and return its path."""
    text = (EXAMPLES / f'{name}_format.py').read_text()
    for key, value in values.items():
        text, count = re.subn(rf'^{key} = .*', f'{key} = {value!r}', text, flags=re.MULTILINE)
        assert count == 1
    path = folder / 'my_data.py'
    path.write_text(text)
    return path


def write_images(folder, suffix):
    folder.mkdir(parents=True, exist_ok=True)
    for name in OBJECTS:
        pixels = np.random.default_rng(len(OBJECTS[name])).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
        cv2.imwrite(str(folder / f'{name}{suffix}'), pixels)


def write_voc(root):
    for folder in ('Annotations', 'ImageSets/Main'):
        (root / folder).mkdir(parents=True)
    write_images(root / 'JPEGImages', '.jpg')
    for split in ('train', 'val', 'test'):
        (root / f'ImageSets/Main/{split}.txt').write_text('\n'.join(OBJECTS))
    for name, objects in OBJECTS.items():
        annotation = ET.Element('annotation')
        size = ET.SubElement(annotation, 'size')
        ET.SubElement(size, 'width').text = ET.SubElement(size, 'height').text = str(SIDE)
        for kind, (left, top, right, bottom) in objects:
            item = ET.SubElement(annotation, 'object')
            ET.SubElement(item, 'name').text = kind
            box = ET.SubElement(item, 'bndbox')
            # VOC counts pixels from 1
            for side, value in dict(xmin=left + 1, ymin=top + 1, xmax=right + 1, ymax=bottom + 1).items():
                ET.SubElement(box, side).text = str(value)
        ET.ElementTree(annotation).write(root / f'Annotations/{name}.xml')


def write_yolo(root):
    for split in ('train', 'val', 'test'):
        write_images(root / f'images/{split}', '.png')
        (root / f'labels/{split}').mkdir(parents=True)
        for name, objects in OBJECTS.items():
            lines = [
                f'{["plate", "cell"].index(kind)} {(x1 + x2) / 2 / SIDE} {(y1 + y2) / 2 / SIDE} '
                f'{(x2 - x1) / SIDE} {(y2 - y1) / SIDE}'
                for kind, (x1, y1, x2, y2) in objects
            ]
            (root / f'labels/{split}/{name}.txt').write_text('\n'.join(lines))
    (root / 'data.yaml').write_text('names: [plate, cell]\n')


def read_objects(cfg, split):
    """Return class and box of the objects in each image, as MMDetection reads them."""
    init_default_scope('mmdet')
    dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    return {
        info['img_path'].rpartition('/')[2][0]: [
            (dataset.metainfo['classes'][instance['bbox_label']], tuple(instance['bbox']))
            for instance in info['instances']
        ]
        for info in infos
    }


@pytest.mark.parametrize('name', FORMATS)
def test_values_at_the_top_reach_all_parts(tmp_path, name):
    values = dict(data_root='there/', classes=('cat',), image_size=(512, 384), batch_size=4, epochs=20)
    cfg = Config.fromfile(copy_with(tmp_path, name, **values, learning_rate=0.002))
    assert cfg.model.bbox_head.num_classes == 1
    assert cfg.train_cfg.max_epochs == 20
    assert cfg.optim_wrapper.optimizer.lr == 0.002
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        assert loader.batch_size == cfg.auto_scale_lr.base_batch_size == 4
        assert loader.dataset.metainfo == dict(classes=('cat',))
        assert loader.dataset.data_root == 'there/'
        assert 'scale=(512, 384)' in str(loader.dataset.pipeline) or "'scale': (512, 384)" in str(
            loader.dataset.pipeline
        )
        if name != 'voc' and split != 'train':
            assert cfg[f'{split}_evaluator'].ann_file == f'there/{loader.dataset.ann_file}'


def test_configs_in_the_documentation(tmp_path):
    """Complete ones load, and have no likely mistakes."""
    text = ''.join((ROOT / path).read_text() for path in ('README.md', 'docs/your_data.md'))
    blocks = re.findall(r'```python\n(_base_ = .*?)```', text, flags=re.DOTALL)
    assert len(blocks) >= 3
    for number, block in enumerate(blocks):
        path = tmp_path / f'block{number}.py'
        path.write_text(block)
        assert check_config(Config.fromfile(path), ['train', 'val']) == []


def test_examples_differ_only_in_their_data():
    """A change of one example belongs into all of them."""
    parts = {}
    for name in FORMATS:
        cfg = Config.fromfile(EXAMPLES / f'{name}_format.py').to_dict()
        for key in ('data_root', 'dataset', 'test_dataset', 'test_pipeline', 'val_evaluator', 'test_evaluator'):
            del cfg[key]
        for split in ('train', 'val', 'test'):
            dataset = cfg[f'{split}_dataloader'].pop('dataset')
            cfg[f'{split}_dataloader'] |= dict(metainfo=dataset['metainfo'], filter_cfg=dataset.get('filter_cfg'))
        parts[name] = cfg
    assert parts['coco'] == parts['voc'] == parts['yolo']


@pytest.mark.parametrize('images', [20, 205, 5000])
def test_schedule_follows_the_number_of_images(images):
    """Warm-up in the first 5 % of the training, then a cosine to 5 % of the learning rate."""
    cfg = Config.fromfile(EXAMPLES / 'coco_format.py')
    peak, epoch = cfg.optim_wrapper.optimizer.lr, -(-images // cfg.batch_size)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], peak)
    schedulers = []
    for kind, config in zip((LinearLR, CosineAnnealingLR), cfg.param_scheduler, strict=True):
        arguments = {key: value for key, value in config.items() if key not in ('type', 'convert_to_iter_based')}
        schedulers.append(kind.build_iter_from_epoch(optimizer, **arguments, epoch_length=epoch))
    rates = []
    for _ in range(cfg.train_cfg.max_epochs * epoch):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    highest = int(np.argmax(rates))
    assert highest == pytest.approx(0.05 * len(rates), abs=2)
    assert rates[0] < 0.01 * peak
    assert rates[highest] == pytest.approx(peak, rel=1e-6)
    assert np.diff(rates[: highest + 1]).min() > 0 > np.diff(rates[highest + 1 :]).max()
    assert rates[-1] == pytest.approx(peak / 20, rel=0.05)


def test_voc_data_train_and_evaluate(monkeypatch, tmp_path):
    write_voc(tmp_path / 'data')
    values = dict(classes=('cell', 'plate'), image_size=(SIDE, SIDE), batch_size=2, epochs=20)
    config = copy_with(tmp_path, 'voc', data_root=f'{tmp_path}/data/', **values)
    objects = {name: sorted(objects) for name, objects in OBJECTS.items()}
    assert {name: sorted(found) for name, found in read_objects(Config.fromfile(config), 'test').items()} == objects
    options = [
        'default_hooks.logger.interval=20',
        'train_cfg.val_interval=20',
        'train_dataloader.num_workers=0',
        'val_dataloader.num_workers=0',
    ]
    options += ['train_dataloader.persistent_workers=False', 'val_dataloader.persistent_workers=False']
    run_here(
        *(monkeypatch, ROOT / 'tools/train.py', config, '--work-dir', tmp_path / 'work', '--cfg-options', *options)
    )
    training, (evaluation,) = scalars(tmp_path / 'work')
    assert len(training) == 20
    assert all(record['loss'] > 0 for record in training)
    assert 0 <= evaluation['coco/bbox_mAP_50'] <= 1  # CocoMetric, without a COCO file


def test_yolo_labels_convert(monkeypatch, tmp_path):
    """By the lines at the top of the example."""
    pytest.importorskip('supervision', reason='of the extra [data]')
    root = tmp_path / 'data'
    write_yolo(root)
    lines = (EXAMPLES / 'yolo_format.py').read_text().split('#\n')[1].splitlines()
    monkeypatch.chdir(root)
    exec('\n'.join(line.removeprefix('#   ') for line in lines))
    cfg = Config.fromfile(copy_with(tmp_path, 'yolo', data_root=f'{root}/', classes=('plate', 'cell')))
    for split in ('train', 'val', 'test'):
        found = read_objects(cfg, split)
        assert found.keys() == OBJECTS.keys()
        for name, objects in OBJECTS.items():
            assert [kind for kind, _ in found[name]] == [kind for kind, _ in objects]
            np.testing.assert_allclose([box for _, box in found[name]], [box for _, box in objects], atol=0.01)
    names = [category['name'] for category in json.loads((root / 'annotations/val.json').read_text())['categories']]
    assert names == ['plate', 'cell']
