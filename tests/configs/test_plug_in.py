"""Train stock configs of MMDetection and MMPretrain, with only the backbone and the neck replaced."""

from pathlib import Path

import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample

CONFIGS = Path(__file__).parents[2] / 'configs'
HEIGHT, WIDTH = 128, 160
CHANNELS = [128, 192, 320]


def backbone(*out_indices):
    return dict(_delete_=True, type='mmevm.EfficientViM', arch='m1', out_indices=out_indices)


def stem_and_stages(*out_strides):
    return dict(_delete_=True, type='mmevm.EfficientViM', arch='m1', out_strides=out_strides)


def neck(in_channels=CHANNELS, out_channels=256, num_outs=5, **kwargs):
    return dict(
        _delete_=True,
        type='mmevm.UpsampleFPN',
        in_channels=in_channels,
        out_channels=out_channels,
        num_outs=num_outs,
        **kwargs,
    )


FROM_4 = dict(backbone=backbone(0, 1, 2), neck=neck(num_upsamples=2))
FROM_8 = dict(backbone=backbone(0, 1, 2), neck=neck(num_upsamples=1, add_extra_convs='on_output'))
STEM_FROM_4 = dict(backbone=stem_and_stages(4, 8, 16, 32), neck=dict(in_channels=[32, 64, 128, 192]))
STEM_FROM_8 = dict(
    backbone=stem_and_stages(8, 16, 32, 64),
    neck=neck([64, *CHANNELS], num_upsamples=0, add_extra_convs='on_input'),
)
STEM_RTMDET = dict(backbone=stem_and_stages(8, 16, 32), neck=dict(in_channels=[64, 128, 192]))
RTMDET = dict(backbone=backbone(0, 1), neck=neck(CHANNELS[:2], 96, num_outs=3, num_upsamples=1))
DETR = dict(backbone=backbone(0, 1, 2), neck=neck(num_outs=4, num_upsamples=1))
DETR_WITH_ITS_NECK = dict(backbone=backbone(0, 1, 2), neck=dict(in_channels=CHANNELS))
OURS = dict(backbone=dict(init_cfg=None))  # without the download

DETECTORS = {
    'mask-rcnn': ('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', FROM_4, [4, 8, 16, 32, 64]),
    'mask-rcnn-ours': (f'{CONFIGS}/maskrcnn_evm_m1.py', OURS, [4, 8, 16, 32, 64]),
    'cascade-mask-rcnn': ('mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py', FROM_4, [4, 8, 16, 32, 64]),
    'retinanet': ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', FROM_8, [8, 16, 32, 64, 128]),
    'faster-rcnn-stem': ('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', STEM_FROM_4, [4, 8, 16, 32, 64]),
    'retinanet-stem': ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', STEM_FROM_8, [8, 16, 32, 64, 128]),
    'rtmdet-stem': ('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py', STEM_RTMDET, [8, 16, 32]),
    'retinanet-ours': (f'{CONFIGS}/retinanet_evm_m1.py', OURS, [8, 16, 32, 64, 128]),
    'atss': ('mmdet::atss/atss_r50_fpn_1x_coco.py', FROM_8, [8, 16, 32, 64, 128]),
    'fcos': ('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', FROM_8, [8, 16, 32, 64, 128]),
    'rtmdet': ('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py', RTMDET, [8, 16, 32]),
    'deformable-detr': ('mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py', DETR, [8, 16, 32, 64]),
    'deformable-detr-with-its-neck': (
        'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
        DETR_WITH_ITS_NECK,
        [16, 32, 64, 128],
    ),
}


def read(folder, base, model):
    path = folder / 'config.py'
    path.write_text(f'_base_ = {base!r}\nmodel = {model!r}\n')
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    return cfg


def build(cfg):
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model.train()


def train_step(model, cfg, data):
    """Run a training step. All parameters of the backbone and the neck must get a gradient."""
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    grads, trained = {}, {}
    for name, parameter in model.named_parameters():
        if name.startswith(('backbone.', 'neck.')) and parameter.requires_grad:
            trained[name] = parameter
            parameter.register_hook(lambda grad, name=name: grads.update({name: grad.clone()}))
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    logged = model.train_step(data, wrapper)

    assert logged['loss'].isfinite()
    assert logged['loss'] > 0
    assert trained
    assert sorted(grads) == sorted(trained)
    assert [name for name, grad in grads.items() if not grad.isfinite().all()] == []
    # A loss that samples anchors may have sampled none of a coarse level, so its gradient may be zero.
    assert [name for name, grad in grads.items() if name.startswith('backbone.') and not grad.any()] == []
    convs = [name for name, grad in grads.items() if grad.dim() == 4 and grad.any()]
    assert [name for name in convs if trained[name].equal(before[name])] == []


@pytest.mark.parametrize('name', DETECTORS)
def test_detector_trains_and_detects(name, tmp_path):
    base, changes, strides = DETECTORS[name]
    cfg = read(tmp_path, base, changes)
    with_mask = 'mask' in name
    two_stage = 'rpn' in cfg.model.test_cfg
    # Scores of an untrained detector are below any threshold.
    (cfg.model.test_cfg.rcnn if two_stage else cfg.model.test_cfg).score_thr = 0
    if two_stage:  # two seconds in place of fifteen
        cfg.model.test_cfg.rpn.max_per_img = cfg.model.test_cfg.rcnn.max_per_img = 10
        stages = cfg.model.train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 32
    model = build(cfg)

    train_step(model, cfg, demo_mm_inputs(2, (3, HEIGHT, WIDTH), num_items=[3, 2], with_mask=with_mask))

    model.eval()
    with torch.no_grad():
        samples = model.test_step(demo_mm_inputs(2, (3, HEIGHT, WIDTH)))
    assert len(samples) == 2
    for sample in samples:
        assert isinstance(sample, DetDataSample)
        found = sample.pred_instances
        assert len(found) > 0
        assert found.bboxes.shape == (len(found), 4)
        assert found.bboxes.isfinite().all()
        assert (found.bboxes >= 0).all()
        assert (found.bboxes <= torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])).all()
        assert found.labels.max() < 80
        if with_mask:
            assert found.masks.shape[0] == len(found)

    with torch.no_grad():
        levels = model.extract_feat(torch.zeros(1, 3, 256, 384))
    assert [(256 / level.shape[2], 384 / level.shape[3]) for level in levels] == [(s, s) for s in strides]
    if name.startswith('deformable'):
        assert model.num_feature_levels == len(strides)  # attention takes positions relative to each level's size
    else:
        head = model.rpn_head if two_stage else model.bbox_head
        assert head.prior_generator.strides == [(s, s) for s in strides]


def test_classifier_trains_and_classifies(tmp_path):
    head = dict(in_channels=320, num_classes=7)
    cfg = read(tmp_path, 'mmpretrain::resnet/resnet50_8xb32_in1k.py', dict(backbone=backbone(2), head=head))
    assert (cfg.model.neck.type, cfg.model.head.type) == ('GlobalAveragePooling', 'LinearClsHead')
    cfg.model.data_preprocessor = cfg.data_preprocessor
    model = build(cfg)
    images = [torch.randint(0, 256, (3, HEIGHT, WIDTH), dtype=torch.uint8) for _ in range(2)]
    data = dict(inputs=images, data_samples=[DataSample().set_gt_label(i) for i in range(2)])

    train_step(model, cfg, data)

    model.eval()
    with torch.no_grad():
        samples = model.test_step(data)
    for sample in samples:
        assert sample.pred_score.shape == (7,)
        assert sample.pred_score.sum() == pytest.approx(1)
        assert sample.pred_label == sample.pred_score.argmax()
