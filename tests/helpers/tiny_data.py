"""Configs of the demos with a few generated images, for fixtures."""

import itertools

import cv2
import numpy as np
from command_line import ROOT, succeed
from mmengine.config import Config

from mmevm.cli import replace_data_root


def make_shapes(root):
    """Write four training and two validation images with masks, in COCO format, to a folder and return it."""
    succeed(ROOT / 'tools/make_shapes.py', root, '--num-train', '4', '--num-val', '2', cwd=root)
    return root


def make_classifier(root):
    """Write four images in each of two class folders, and return the config of the digits demo for them."""
    for split, name, i in itertools.product(('train', 'val'), ('cat', 'dog'), range(4)):
        (root / split / name).mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)
        cv2.imwrite(str(root / split / name / f'{i}.png'), image)
    cfg = replace_data_root(Config.fromfile(ROOT / 'configs/demo/efficientvim-m1_digits.py'), str(root))
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].update(num_workers=0, persistent_workers=False, batch_size=4)
    cfg.val_evaluator.topk = cfg.test_evaluator.topk = (1,)
    cfg.model.head.num_classes = cfg.data_preprocessor.num_classes = 2
    return cfg
