"""Configs and checkpoints of a small detector and a small classifier with random weights."""

from pathlib import Path

import torch
from command_line import ROOT
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from randomize import randomize

DETECTOR = """
_base_ = '{root}/configs/demo/maskrcnn_evm_m1_shapes.py'
metainfo = dict(classes=('disc', 'box'), palette=[(220, 20, 60), (20, 60, 220)])
model = dict(
    roi_head=dict(bbox_head=dict(num_classes=2), mask_head=dict(num_classes=2)),
    # Few objects, so that masks are pasted and drawn in no time.
    test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=4)),
)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
test_dataloader = dict(dataset=dict(metainfo=metainfo, pipeline=test_pipeline))
"""
CLASSIFIER = """
_base_ = '{root}/configs/demo/efficientvim-m1_digits.py'
test_dataloader = dict(dataset=dict(metainfo=dict(classes={classes})))
"""
DIGITS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')


def write_detector(folder: Path, **meta) -> tuple[Path, Path]:
    """Write a Mask R-CNN of two classes; ``meta`` goes into the checkpoint."""
    return _write(folder, 'detector', DETECTOR.format(root=ROOT), meta)


def write_classifier(folder: Path, **meta) -> tuple[Path, Path]:
    """Write a classifier of ten classes; ``meta`` goes into the checkpoint."""
    return _write(folder, 'classifier', CLASSIFIER.format(root=ROOT, classes=DIGITS), meta)


def _write(folder: Path, name: str, text: str, meta: dict) -> tuple[Path, Path]:
    config, checkpoint = folder / f'{name}.py', folder / f'{name}.pth'
    config.write_text(text)
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    if cfg.default_scope == 'mmpretrain':
        cfg.model.data_preprocessor = cfg.data_preprocessor
    torch.manual_seed(0)
    model = randomize(MODELS.build(cfg.model))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), checkpoint)
    return config, checkpoint
