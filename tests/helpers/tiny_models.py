"""Configs and checkpoints of a small detector and a small classifier with random weights."""

from pathlib import Path
from typing import Any

import torch
from command_line import ROOT
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from randomize import randomize

from mmevm.cli import read_config

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
ARCH = dict(embed_dims=(16, 32, 48), depths=(1, 1, 1), state_dims=(9, 4, 4))
DIGITS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')


def write_detector(folder: Path, **meta) -> tuple[Path, Path]:
    """Write a Mask R-CNN of two classes; ``meta`` goes into the checkpoint."""
    return _write(folder, 'detector', DETECTOR.format(root=ROOT), meta)


def write_shape_detector(folder: Path, data_root: Path) -> tuple[Path, Path]:
    """Write a Mask R-CNN for the data of ``tools/make_shapes.py``."""
    text = DETECTOR.format(root=ROOT).replace("'disc', 'box'", "'shape',").replace('num_classes=2', 'num_classes=1')
    text += f"""
data = dict(data_root='{data_root}/')
test_dataloader['dataset'].update(data)
test_evaluator = dict(ann_file='{data_root}/annotations/instances_val.json')
"""
    return _write(
        folder, 'shape_detector', text.replace(', (20, 60, 220)', ''), dict(dataset_meta=dict(classes=('shape',)))
    )


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


def write_small(folder: Path, config: str, score_thr: float) -> tuple[Path, Path]:
    """Write a small detector of three classes with the heads and the pipeline of another config, for 96 pixels."""
    cfg = read_config(config if '::' in config else str(ROOT / 'configs' / config))
    init_default_scope(cfg.default_scope)
    shrink(cfg.model)
    cfg.model.test_cfg.get('rcnn', cfg.model.test_cfg).score_thr = score_thr
    metainfo = dict(classes=('disc', 'box', 'star'), palette=[(220, 20, 60), (20, 60, 220), (60, 220, 20)])
    cfg.test_dataloader.dataset.metainfo = metainfo
    for step in cfg.test_dataloader.dataset.pipeline:
        step.update({key: (96, 96) for key in ('scale', 'size') if key in step})
    torch.manual_seed(0)
    model = randomize(MODELS.build(cfg.model))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and 'head' in name:  # clear scores, and boxes that move
            torch.nn.init.normal_(parameter, 0, 0.3 if 'cls' in name else 0.05)
        elif 'rtm_reg' in name:  # distances to the sides of a box, of which the negative ones become 0
            torch.nn.init.uniform_(parameter, 1, 3)
    normalize_features(model)
    cfg.dump(folder / 'small.py')
    torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=metainfo)), folder / 'small.pth')
    return folder / 'small.py', folder / 'small.pth'


@torch.no_grad()
def normalize_features(model: Any) -> None:
    """Set the running statistics of BatchNorm to those of noise. Otherwise many scores are equal up to rounding."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
            layer.reset_running_stats()
            layer.momentum = None  # the average
            layer.train()
    maps = model.extract_feat(torch.randn(4, 3, 96, 96))
    for name in ('bbox_head', 'decode_head'):
        if hasattr(model, name):
            getattr(model, name)(maps)


def shrink(model: ConfigDict) -> ConfigDict:
    """Make the config of a detector of MMDetection or mmevm a small one of three classes, in place.

    One with RoI heads gets the backbone and neck of ``configs/maskrcnn_evm_m1.py``.
    """
    with_rois = 'roi_head' in model
    if with_rois:
        model.backbone = ConfigDict(type='mmevm.EfficientViM')
        model.neck = ConfigDict(type='mmevm.UpsampleFPN', in_channels=[16, 32, 48], num_outs=5, num_upsamples=2)
    model.backbone.update(arch=ConfigDict(ARCH), init_cfg=None)
    maps = [8, 16, 32] if 'out_strides' in model.backbone else [16, 32, 48]
    model.neck.update(in_channels=maps, out_channels=24)
    if not with_rois:
        model.bbox_head.update(in_channels=24, feat_channels=24, stacked_convs=1, num_classes=3)
        model.test_cfg.update(nms_pre=200, max_per_img=20)
        return model
    model.rpn_head.update(in_channels=24, feat_channels=24)
    heads = model.roi_head
    for name, changes in dict(
        bbox_roi_extractor=dict(out_channels=24),
        bbox_head=dict(in_channels=24, fc_out_channels=32, num_classes=3),
        mask_roi_extractor=dict(out_channels=24),
        mask_head=dict(in_channels=24, conv_out_channels=24, num_convs=1, num_classes=3),
    ).items():
        for stage in heads.get(name, []) if isinstance(heads.get(name), list) else filter(None, [heads.get(name)]):
            stage.update(changes)
    model.test_cfg.rpn.update(nms_pre=100, max_per_img=50)
    model.test_cfg.rcnn.update(max_per_img=10)
    return model
