"""Compare the COCO configs with the authors' recipe."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, init_default_scope

CONFIGS = Path(__file__).parents[2] / 'configs'
CHANNELS = dict(m1=[128, 192, 320], m2=[128, 256, 512], m3=[224, 320, 512], m4=[224, 320, 512])
STRIDES = dict(maskrcnn=[4, 8, 16, 32, 64], retinanet=[8, 16, 32, 64, 128])
METRICS = dict(maskrcnn=['bbox', 'segm'], retinanet='bbox')

coco = pytest.mark.parametrize(('detector', 'arch'), [(d, a) for d in STRIDES for a in CHANNELS])


def read(detector, arch):
    cfg = Config.fromfile(CONFIGS / f'{detector}_evm_{arch}.py')
    init_default_scope(cfg.default_scope)
    return cfg


@coco
def test_model(detector, arch):
    cfg = read(detector, arch)
    assert cfg.model.backbone.init_cfg.checkpoint == f'timm://efficientvim_{arch}.e450_in1k'
    assert cfg.model.backbone.norm_eval
    model = MODELS.build(cfg.model)
    assert list(model.backbone.out_channels) == CHANNELS[arch]
    assert model.backbone.frozen_stages == -1
    assert all(p.requires_grad for name, p in model.named_parameters() if not name.endswith('mixer.A'))

    with torch.no_grad():
        levels = model.extract_feat(torch.zeros(1, 3, 256, 256))
    assert [256 // level.shape[-1] for level in levels] == STRIDES[detector]
    assert {level.shape[1] for level in levels} == {256}
    head = model.rpn_head if detector == 'maskrcnn' else model.bbox_head
    assert [stride[0] for stride in head.prior_generator.strides] == STRIDES[detector]

    preprocessor = model.data_preprocessor
    assert preprocessor.mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert preprocessor.std.flatten().tolist() == pytest.approx([58.395, 57.12, 57.375])
    assert preprocessor._channel_conversion
    assert preprocessor.pad_size_divisor == 32


@coco
def test_heads_equal_the_stock_r50_config(detector, arch, tmp_path):
    name = dict(maskrcnn='mask-rcnn_r50_fpn', retinanet='retinanet_r50_fpn')[detector]
    stock = tmp_path / 'stock.py'
    stock.write_text(f"_base_ = 'mmdet::_base_/models/{name}.py'")
    expected = Config.fromfile(stock).model
    model = read(detector, arch).model
    for key in set(model) | set(expected):
        if key not in ('backbone', 'neck'):
            assert model[key] == expected[key], key


@coco
def test_schedule(detector, arch):
    cfg = read(detector, arch)
    assert cfg.train_cfg.max_epochs == 12
    assert cfg.train_dataloader.batch_size == 16
    assert cfg.auto_scale_lr.base_batch_size == 16
    assert not cfg.auto_scale_lr.enable

    wrapper = build_optim_wrapper(torch.nn.Linear(1, 1), cfg.optim_wrapper)
    assert type(wrapper) is OptimWrapper  # float32, no AMP
    assert not wrapper.clip_grad_kwargs
    assert type(wrapper.optimizer) is torch.optim.AdamW
    group = wrapper.optimizer.param_groups[0]
    assert (group['lr'], group['betas'], group['weight_decay']) == (2e-4, (0.9, 0.999), 0.05)

    iterations = 733  # of an epoch; the warm-up counts iterations, the steps count epochs
    schedulers = [PARAM_SCHEDULERS.build(dict(s), default_args=dict(optimizer=wrapper)) for s in cfg.param_scheduler]
    rates = []
    for step in range(12 * iterations):
        rates.append(group['lr'])
        wrapper.optimizer.step()
        for scheduler in schedulers:
            if not scheduler.by_epoch or (step + 1) % iterations == 0:
                scheduler.step()
    assert rates[0] == pytest.approx(2e-4 * 0.001)
    assert rates[250] == pytest.approx(2e-4 * (0.001 + 0.999 * 250 / 499))
    for epoch, rate in [(1.0, 2e-4), (7.99, 2e-4), (8.01, 2e-5), (10.99, 2e-5), (11.01, 2e-6), (11.99, 2e-6)]:
        assert rates[int(epoch * iterations)] == pytest.approx(rate), epoch


@coco
def test_data(detector, arch):
    cfg = read(detector, arch)
    for loader, split in [(cfg.train_dataloader, 'train'), (cfg.val_dataloader, 'val'), (cfg.test_dataloader, 'val')]:
        assert loader.dataset.data_root == 'data/coco/'
        assert loader.dataset.ann_file == f'annotations/instances_{split}2017.json'
        resizes = [step for step in loader.dataset.pipeline if step.type == 'Resize']
        assert [(step.scale, step.keep_ratio) for step in resizes] == [((1333, 800), True)]
    flips = [step.prob for step in cfg.train_dataloader.dataset.pipeline if step.type == 'RandomFlip']
    assert flips == [0.5]
    assert [step.type for step in cfg.train_dataloader.dataset.pipeline] == [
        'LoadImageFromFile',
        'LoadAnnotations',
        'Resize',
        'RandomFlip',
        'PackDetInputs',
    ]
    assert cfg.val_evaluator.metric == METRICS[detector]


def test_all_configs_are_tested():
    names = {path.stem for path in CONFIGS.glob('*.py')}
    assert names == {f'{detector}_evm_{arch}' for detector in STRIDES for arch in CHANNELS}
