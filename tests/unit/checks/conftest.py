import itertools
import json
import xml.etree.ElementTree as ET

import cv2
import numpy as np
import pytest
import tiny_data
from command_line import ROOT
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from mmevm.cli import replace_data_root, start
from mmevm.engine import make_resumable

NUMBERS = itertools.count()


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    """The folder of a small COCO dataset with masks."""
    return tiny_data.make_shapes(tmp_path_factory.mktemp('shapes'))


@pytest.fixture
def detector(shapes):
    """The config of the detection demo, without mistakes."""
    cfg = replace_data_root(Config.fromfile(ROOT / 'configs/demo/maskrcnn_evm_m1_shapes.py'), str(shapes))
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].update(num_workers=0, persistent_workers=False)
    return cfg


@pytest.fixture
def classifier(tmp_path):
    """The config of a classifier of two classes."""
    return tiny_data.make_classifier(tmp_path)


@pytest.fixture
def voc(tmp_path, detector):
    """The config of a detector with a dataset in Pascal VOC format."""
    names = {'train': 'ab', 'val': 'c'}
    for folder in ('JPEGImages', 'Annotations', 'sets'):
        (tmp_path / folder).mkdir()
    for split, images in names.items():
        (tmp_path / f'sets/{split}.txt').write_text('\n'.join(images))
        for name in images:
            cv2.imwrite(str(tmp_path / f'JPEGImages/{name}.jpg'), np.full((64, 64, 3), 127, np.uint8))
            root = ET.Element('annotation')
            size = ET.SubElement(root, 'size')
            ET.SubElement(size, 'width').text = ET.SubElement(size, 'height').text = '64'
            for kind in ('cell', 'plate'):
                item = ET.SubElement(root, 'object')
                ET.SubElement(item, 'name').text = kind
                box = ET.SubElement(item, 'bndbox')
                for side, value in dict(xmin=5, ymin=5, xmax=40, ymax=40).items():
                    ET.SubElement(box, side).text = str(value)
            ET.ElementTree(root).write(tmp_path / f'Annotations/{name}.xml')
    cfg = detector
    for split in names:
        cfg[f'{split}_dataloader'].dataset = dict(
            type='XMLDataset',
            data_root=f'{tmp_path}/',
            ann_file=f'sets/{split}.txt',
            data_prefix=dict(sub_data_root=''),
            metainfo=dict(classes=('cell', 'plate')),
            filter_cfg=dict(filter_empty_gt=True),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', with_bbox=True),
                dict(type='Resize', scale=(64, 64)),
                dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
            ],
            test_mode=split == 'val',
        )
    cfg.model.type = 'FasterRCNN'
    cfg.model.roi_head.bbox_head.num_classes = 2
    cfg.model.roi_head.update(mask_head=None, mask_roi_extractor=None)
    cfg.val_evaluator = dict(type='VOCMetric', metric='mAP')
    return cfg


@pytest.fixture
def check(capsys, tmp_path):
    """Run ``tools/train.py --check`` in this process. The fixture maps a config to its summary and warnings."""

    def check(cfg, splits=('train', 'val'), check_only=True):
        cfg = cfg.copy()
        cfg.experiment_name = f'check_{next(NUMBERS)}'
        make_resumable(cfg)
        capsys.readouterr()
        cfg.launcher, cfg.work_dir = 'none', str(tmp_path / 'work')
        try:
            with pytest.raises(SystemExit) as stop:
                start(cfg, splits, Runner.train, check_only)
        finally:
            DefaultScope.get_instance(cfg.experiment_name, scope_name=cfg.default_scope)
        output = capsys.readouterr().out
        warnings = [line.split(' - WARNING - ')[1] for line in output.splitlines() if ' - WARNING - ' in line]
        warnings = [line for line in warnings if 'will be deprecated' not in line and 'requires_grad=False' not in line]
        assert stop.value.code == 0
        return output.partition('Check passed.')[2], warnings

    return check


@pytest.fixture
def edit(shapes, tmp_path, detector):
    """A function that changes the training annotations of the detector with another function."""

    def edit(change):
        path = tmp_path / 'train.json'
        coco = json.loads((shapes / 'annotations/instances_train.json').read_text())
        changed = change(coco)
        path.write_text(json.dumps(coco if changed is None else changed))
        detector.train_dataloader.dataset.ann_file = str(path)
        return coco

    return edit
