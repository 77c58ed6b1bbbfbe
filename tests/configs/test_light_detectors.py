"""RTMDet, RTMDet-Ins, Faster R-CNN and DINO: the COCO configs that have a folder of their own."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, PARAM_SCHEDULERS, init_default_scope

CONFIGS = Path(__file__).parents[2] / 'configs'
CHANNELS = dict(m1=[128, 192, 320], m2=[128, 256, 512], m3=[224, 320, 512], m4=[224, 320, 512])
STEM = dict(m1=[32, 64], m2=[32, 64], m3=[56, 112], m4=[56, 112])  # stride 4 and 8
ARCHS = {'rtmdet': 'm1 m2 m3 m4', 'rtmdet-ins': 'm1 m2 m3 m4', 'faster-rcnn': 'm1 m4', 'dino': 'm4'}
FOLDERS = {'rtmdet': 'rtmdet', 'rtmdet-ins': 'rtmdet', 'faster-rcnn': 'faster_rcnn', 'dino': 'dino'}
STRIDES = {
    'rtmdet': [8, 16, 32],
    'rtmdet-ins': [8, 16, 32],
    'faster-rcnn': [4, 8, 16, 32, 64],
    'dino': [8, 16, 32, 64],
}
BLOCKS = dict(m1=1, m2=1, m3=1, m4=2)  # of RTMDet's neck
WIDTHS = dict(m1=96, m2=128, m3=128, m4=192)  # of RTMDet's neck and head: those of RTMDet-tiny, -s, -s, -m
STOCK = {
    'rtmdet': 'rtmdet/rtmdet_l_8xb32-300e_coco.py',
    'rtmdet-ins': 'rtmdet/rtmdet-ins_l_8xb32-300e_coco.py',
    'faster-rcnn': 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'dino': 'dino/dino-4scale_r50_8xb2-12e_coco.py',
}
RECIPE = 'rtmdet/rtmdet_l_convnext_b_4xb32-100e_coco.py'

every_config = pytest.mark.parametrize(('detector', 'arch'), [(d, a) for d in ARCHS for a in ARCHS[d].split()])
every_rtmdet = pytest.mark.parametrize(('detector', 'arch'), [(d, a) for d in ('rtmdet', 'rtmdet-ins') for a in WIDTHS])


def path_of(detector, arch):
    return CONFIGS / FOLDERS[detector] / f'{detector}_evm_{arch}.py'


def read(detector, arch):
    cfg = Config.fromfile(path_of(detector, arch))
    init_default_scope(cfg.default_scope)
    return cfg


def read_stock(name, folder):
    path = folder / 'stock.py'
    path.write_text(f"_base_ = 'mmdet::{name}'")
    return plain(Config.fromfile(path))


def plain(value):
    """Return a config's value as dicts and lists, without the scope that mmengine adds to bases of other packages."""
    if isinstance(value, Config):
        return plain(value.to_dict())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key != '_scope_'}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def write_coco(folder, count=4):
    """Write images with one rectangle each, and their annotations with boxes and polygons."""
    images, annotations = [], []
    for i in range(count):
        x, y, width, height = 20 + 8 * i, 16, 70, 50 + 4 * i
        image = np.full((120, 160, 3), 90, np.uint8)
        image[y : y + height, x : x + width] = 40 * i
        cv2.imwrite(str(folder / f'{i}.png'), image)
        images.append(dict(id=i, file_name=f'{i}.png', width=160, height=120))
        polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
        annotations.append(
            dict(id=i, image_id=i, category_id=1 + i % 2, bbox=[x, y, width, height], area=width * height, iscrowd=0)
            | dict(segmentation=[polygon])
        )
    categories = [dict(id=1, name='person'), dict(id=2, name='bicycle')]
    (folder / 'coco.json').write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))


def load(dataset, folder, side=None):
    """Return two samples of a dataset config, read from the files of `write_coco` and made `side` pixels large."""

    def resized(value):
        if isinstance(value, dict):
            sizes = {key: (side, side) for key in ('img_scale', 'scale', 'crop_size', 'size') if key in value}
            sizes |= dict(scales=[(side, side)]) if 'scales' in value else {}
            return {key: resized(item) for key, item in value.items()} | sizes
        return [resized(item) for item in value] if isinstance(value, list) else value

    dataset = dict(dataset, data_root='', ann_file=str(folder / 'coco.json'), data_prefix=dict(img=str(folder)))
    if side:
        dataset = resized(Config(dataset).to_dict())
    dataset = DATASETS.build(dataset)
    return pseudo_collate([dataset[0], dataset[1]])


def build(cfg):
    cfg.model.backbone.init_cfg = None  # no download
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model


@every_config
def test_model(detector, arch):
    cfg = read(detector, arch)
    assert cfg.model.backbone.init_cfg == dict(type='Pretrained', checkpoint=f'timm://efficientvim_{arch}.e450_in1k')
    model = build(cfg)
    channels = [*STEM[arch], *CHANNELS[arch]]  # stride 4 to 64
    maps = {'faster-rcnn': channels, 'dino': channels[2:]}.get(detector, channels[1:4])
    assert list(model.backbone.out_channels) == maps
    assert model.backbone.frozen_stages == -1
    assert model.backbone.norm_eval == (not detector.startswith('rtmdet'))
    assert all(p.requires_grad for name, p in model.named_parameters() if not name.endswith('mixer.A'))

    preprocessor = model.data_preprocessor
    assert preprocessor.mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert preprocessor.std.flatten().tolist() == pytest.approx([58.395, 57.12, 57.375])
    assert preprocessor._channel_conversion

    with torch.no_grad():
        levels = model.eval().extract_feat(torch.zeros(1, 3, 128, 192))
    assert [(128 / level.shape[2], 192 / level.shape[3]) for level in levels] == [(s, s) for s in STRIDES[detector]]
    assert {level.shape[1] for level in levels} == {WIDTHS[arch] if detector.startswith('rtmdet') else 256}
    if detector == 'dino':
        assert model.num_feature_levels == len(levels)
    else:
        head = model.rpn_head if detector == 'faster-rcnn' else model.bbox_head
        assert head.prior_generator.strides == [(s, s) for s in STRIDES[detector]]


@every_config
def test_rest_of_the_model_is_stock(detector, arch, tmp_path):
    expected = read_stock(STOCK[detector], tmp_path)['model']
    model = plain(read(detector, arch).model)
    if detector == 'dino':  # its levels start at stride 8, which the neck upsamples
        del model['neck'], expected['neck']
    else:
        expected['neck']['in_channels'] = list(build(read(detector, arch)).backbone.out_channels)
    if detector.startswith('rtmdet'):
        width = WIDTHS[arch]
        expected['neck'] |= dict(out_channels=width, num_csp_blocks=BLOCKS[arch])
        expected['bbox_head'] |= dict(in_channels=width, feat_channels=width)
        for part in ('neck', 'bbox_head'):
            expected[part]['norm_cfg']['type'] = 'BN'
        expected['data_preprocessor'] = read_stock(RECIPE, tmp_path)['model']['data_preprocessor']
        expected['data_preprocessor']['pad_size_divisor'] = 32
    del model['backbone'], expected['backbone']
    assert model == expected


@every_rtmdet
def test_rtmdet_recipe_is_that_for_imagenet_weights(detector, arch, tmp_path):
    cfg = plain(read(detector, arch))
    recipe = read_stock(RECIPE, tmp_path)
    data = read_stock(STOCK[detector], tmp_path)
    for key in ('train_cfg', 'param_scheduler', 'default_hooks', 'max_epochs', 'stage2_num_epochs', 'base_lr'):
        assert cfg[key] == recipe[key], key
    for key in ('train_dataloader', 'val_dataloader', 'test_dataloader', 'val_evaluator', 'test_evaluator'):
        assert cfg[key] == data[key], key
    assert cfg['custom_hooks'][0] == recipe['custom_hooks'][0]
    switch = dict(recipe['custom_hooks'][1], switch_pipeline=data['train_pipeline_stage2'])
    assert cfg['custom_hooks'][1:] == [switch]
    assert cfg['optim_wrapper']['optimizer'] == recipe['optim_wrapper']['optimizer']
    assert not cfg['optim_wrapper'].get('clip_grad')


@pytest.mark.parametrize('detector', ['rtmdet', 'rtmdet-ins'])
def test_rtmdet_schedule_in_numbers(detector):
    cfg = read(detector, 'm1')
    assert (cfg.train_cfg.max_epochs, cfg.train_cfg.val_interval, cfg.train_cfg.dynamic_intervals) == (
        100,
        10,
        [(90, 1)],
    )
    assert (cfg.train_dataloader.batch_size, cfg.auto_scale_lr.base_batch_size) == (32, 4 * 32)
    ema, switch = cfg.custom_hooks
    assert (ema.type, ema.ema_type, ema.momentum) == ('EMAHook', 'ExpMomentumEMA', 2e-4)
    assert (switch.type, switch.switch_epoch) == ('PipelineSwitchHook', 90)
    mixing = ['CachedMosaic', 'CachedMixUp']
    assert [step.type for step in cfg.train_dataloader.dataset.pipeline if step.type in mixing] == mixing
    assert not [step for step in switch.switch_pipeline if step.type in mixing]
    assert cfg.val_evaluator.metric == (['bbox', 'segm'] if detector == 'rtmdet-ins' else 'bbox')

    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    wrapper = build_optim_wrapper(net, cfg.optim_wrapper)
    assert type(wrapper.optimizer) is torch.optim.AdamW
    decays = {id(group['params'][0]): group['weight_decay'] for group in wrapper.optimizer.param_groups}
    assert [decays[id(p)] for p in net.parameters()] == [0.05, 0, 0, 0]  # weight; then bias and BatchNorm

    iterations = 50  # of an epoch
    schedulers = []
    for scheduler in cfg.param_scheduler:
        scheduler = dict(scheduler)
        kind = PARAM_SCHEDULERS.get(scheduler['type'])
        if scheduler.pop('convert_to_iter_based', False):
            scheduler.pop('type')
            schedulers.append(kind.build_iter_from_epoch(optimizer=wrapper, **scheduler, epoch_length=iterations))
        else:
            schedulers.append(PARAM_SCHEDULERS.build(scheduler, default_args=dict(optimizer=wrapper)))
    rates = []
    for _ in range(100 * iterations):
        rates.append(wrapper.optimizer.param_groups[0]['lr'])
        wrapper.optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert rates[0] == pytest.approx(1e-8)
    for epoch, rate in [(25, 1e-3), (49, 1e-3), (75, (1e-3 + 5e-5) / 2)]:
        assert rates[epoch * iterations] == pytest.approx(rate), epoch
    assert rates[-1] == pytest.approx(5e-5, rel=1e-3)


@pytest.mark.parametrize('arch', ['m1', 'm4'])
def test_faster_rcnn_recipe_is_that_of_mask_rcnn(arch):
    cfg, mask_rcnn = plain(read('faster-rcnn', arch)), plain(Config.fromfile(CONFIGS / f'maskrcnn_evm_{arch}.py'))
    for key in ('train_cfg', 'optim_wrapper', 'param_scheduler', 'auto_scale_lr', 'default_hooks'):
        assert cfg[key] == mask_rcnn[key], key
    assert cfg['model']['rpn_head'] == mask_rcnn['model']['rpn_head']
    assert cfg['model']['backbone'].pop('out_strides') == STRIDES['faster-rcnn']
    assert cfg['model']['backbone'] == mask_rcnn['model']['backbone']
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        for step in mask_rcnn[loader]['dataset']['pipeline']:
            step.pop('with_mask', None)
        assert cfg[loader] == mask_rcnn[loader]
    assert cfg['val_evaluator']['metric'] == 'bbox'


def test_dino_recipe_is_stock(tmp_path):
    cfg, stock = plain(read('dino', 'm4')), read_stock(STOCK['dino'], tmp_path)
    del cfg['model'], stock['model']
    assert cfg == stock
    assert cfg['train_cfg']['max_epochs'] == 12
    assert (cfg['optim_wrapper']['optimizer']['lr'], cfg['auto_scale_lr']['base_batch_size']) == (1e-4, 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('detector', 'arch', 'side'), [('rtmdet', 'm1', None), ('rtmdet-ins', 'm1', None), ('faster-rcnn', 'm1', 256)]
)
def test_trains_and_detects(detector, arch, side, tmp_path):
    check_training_and_detection(detector, arch, side, tmp_path)


@pytest.mark.slow
def test_dino_trains_and_detects(tmp_path):
    check_training_and_detection('dino', 'm4', 256, tmp_path)


def check_training_and_detection(detector, arch, side, folder):
    """Train one iteration and detect, on images of `side` pixels; None is the size of the config."""
    write_coco(folder)
    cfg = read(detector, arch)
    test_cfg = cfg.model.test_cfg.get('rcnn', cfg.model.test_cfg)
    test_cfg.score_thr = 0  # an untrained classifier is below every threshold
    test_cfg.max_per_img = 20
    model = build(cfg).train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    grads = {}
    for name, parameter in model.named_parameters():
        if name.startswith(('backbone.', 'neck.')) and parameter.requires_grad:
            grads[name] = None
            parameter.register_hook(lambda grad, name=name: grads.update({name: grad.clone()}))

    logged = model.train_step(load(cfg.train_dataloader.dataset, folder, side), wrapper)

    assert logged['loss'].isfinite()
    assert logged['loss'] > 0
    assert [name for name, grad in grads.items() if grad is None or not grad.isfinite().all()] == []
    assert [name for name, grad in grads.items() if name.startswith('backbone.') and not grad.any()] == []
    assert any(grad.any() for name, grad in grads.items() if name.startswith('neck.'))

    samples = model.eval().test_step(load(cfg.val_dataloader.dataset, folder, side))
    for sample in samples:
        found = sample.pred_instances
        assert len(found) > 0
        assert found.bboxes.isfinite().all()
        assert (found.bboxes >= 0).all()
        # mmdet's RTMDet pads before it records the image's shape, so its boxes may reach into the padding.
        width, height = (side / scale for side, scale in zip(sample.img_shape[::-1], sample.scale_factor, strict=True))
        assert (found.bboxes <= torch.tensor([width, height, width, height]) + 1e-3).all()
        assert (found.scores >= 0).all()
        assert found.labels.max() < 80
        if detector == 'rtmdet-ins':
            assert found.masks.shape == (len(found), 120, 160)


def test_every_config_is_tested_and_says_that_it_was_never_trained():
    paths = {path for folder in set(FOLDERS.values()) for path in (CONFIGS / folder).glob('*.py')}
    assert paths == {path_of(detector, arch) for detector in ARCHS for arch in ARCHS[detector].split()}
    for path in paths | {
        path for folder in set(FOLDERS.values()) for path in (CONFIGS / folder).glob('_base_/*_evm.py')
    }:
        comments = ' '.join(path.read_text().replace('\n# ', ' ').split())
        assert 'never been trained on COCO' in comments, path
    for path in paths:
        assert 'What you will most likely change' in path.read_text(), path
