"""Compare the segmentation configs with the recipe of the authors' segmentation code and with their training log."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, PARAM_SCHEDULERS, init_default_scope

pytest.importorskip('mmseg', reason='MMSegmentation is not installed')

CONFIGS = Path(__file__).parents[2] / 'configs' / 'segmentation'
CHANNELS = dict(m1=[128, 192, 320], m2=[128, 256, 512], m3=[224, 320, 512], m4=[224, 320, 512])
STEM = dict(m1=64, m2=64, m3=112, m4=112)  # stride 8
STRIDES = {'fpn': [16, 32, 64, 128], 'fpn-s8': [8, 16, 32, 64]}
CLASSES = dict(ade20k=150, cityscapes=19)
NAMES = [
    *((decoder, arch, 'ade20k') for decoder in STRIDES for arch in CHANNELS),
    *((decoder, arch, 'cityscapes') for decoder in STRIDES for arch in ('m1', 'm4')),
]
# (height, width) of the crops, and (width, height) to which images are resized before
CROPS = dict(ade20k=(512, 512), cityscapes=(512, 1024))
SCALES = dict(ade20k=(2048, 512), cityscapes=(2048, 1024))

every_config = pytest.mark.parametrize(('decoder', 'arch', 'data'), NAMES)


def read(decoder, arch, data):
    cfg = Config.fromfile(CONFIGS / f'{decoder}_evm_{arch}_{data}.py')
    assert cfg.default_scope == 'mmseg'
    init_default_scope('mmseg')
    return cfg


def step(pipeline, kind):
    (found,) = (step for step in pipeline if step.type == kind)
    return {key: value for key, value in found.items() if key != 'type'}


@every_config
def test_model(decoder, arch, data):
    cfg = read(decoder, arch, data)
    assert cfg.model.type == 'EncoderDecoder'
    assert cfg.model.backbone.init_cfg.checkpoint == f'timm://efficientvim_{arch}.e450_in1k'
    assert cfg.model.decode_head.norm_cfg.type == 'SyncBN'
    assert dict(cfg.model.test_cfg) == dict(mode='whole')
    assert 'auxiliary_head' not in cfg.model
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    finest = [STEM[arch]] if decoder == 'fpn-s8' else []
    assert list(model.backbone.out_channels) == [*finest, *CHANNELS[arch]]
    assert model.backbone.norm_eval
    assert all(p.requires_grad for name, p in model.named_parameters() if not name.endswith('mixer.A'))

    head = model.decode_head
    assert type(head).__name__ == 'FPNHead'
    assert (head.num_classes, head.out_channels, head.channels) == (CLASSES[data], CLASSES[data], 128)
    assert (head.dropout.p, head.align_corners, head.ignore_index) == (0.1, False, 255)
    assert type(head.loss_decode).__name__ == 'CrossEntropyLoss'
    assert not head.loss_decode.use_sigmoid
    assert (head.loss_decode.loss_weight, head.loss_decode.class_weight) == (1.0, None)

    preprocessor = model.data_preprocessor
    assert preprocessor.mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert preprocessor.std.flatten().tolist() == pytest.approx([58.395, 57.12, 57.375])
    assert getattr(preprocessor, 'channel_conversion', getattr(preprocessor, '_channel_conversion', None))
    assert tuple(preprocessor.size) == CROPS[data]
    assert (preprocessor.pad_val, preprocessor.seg_pad_val) == (0, 255)

    model.eval()
    with torch.no_grad():
        levels = model.extract_feat(torch.zeros(1, 3, 128, 128))
        logits = model.decode_head(levels)
    assert [128 // level.shape[-1] for level in levels] == STRIDES[decoder]
    side = 128 // STRIDES[decoder][0]
    assert logits.shape == (1, CLASSES[data], side, side)
    strides = head.feature_strides
    assert [stride // strides[0] for stride in strides] == [s // STRIDES[decoder][0] for s in STRIDES[decoder]]


def test_the_authors_model():
    """Stock FPN without norms, four levels of which the last is max-pooled, and 21.7 M parameters with M4."""
    model = revert_sync_batchnorm(MODELS.build(read('fpn', 'm4', 'ade20k').model))
    assert type(model.neck).__module__ == 'mmseg.models.necks.fpn'
    assert [tuple(conv.conv.weight.shape) for conv in model.neck.lateral_convs] == [
        (256, 224, 1, 1),
        (256, 320, 1, 1),
        (256, 512, 1, 1),
    ]
    assert not any(conv.with_norm for conv in [*model.neck.lateral_convs, *model.neck.fpn_convs])
    assert len(model.neck.fpn_convs) == 3
    assert model.decode_head.feature_strides == [4, 8, 16, 32]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 21.7


@every_config
def test_schedule(decoder, arch, data):
    cfg = read(decoder, arch, data)
    assert cfg.train_cfg.type == 'IterBasedTrainLoop'
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval) == (40000, 4000)
    # 8 GPUs × 4 images; crops of Cityscapes have twice the pixels
    batch = 32 if data == 'ade20k' else 16
    assert cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == batch
    assert not cfg.auto_scale_lr.enable

    wrapper = build_optim_wrapper(torch.nn.Linear(1, 1), cfg.optim_wrapper)
    assert type(wrapper) is OptimWrapper  # float32
    assert not wrapper.clip_grad_kwargs
    assert type(wrapper.optimizer) is torch.optim.AdamW
    group = wrapper.optimizer.param_groups[0]
    assert (group['lr'], group['betas'], group['weight_decay']) == (2e-4, (0.9, 0.999), 1e-4)

    (schedule,) = cfg.param_scheduler
    assert (schedule.begin, schedule.end) == (0, 40000)
    iterations = 400  # in place of 40,000: the curve is the same
    scheduler = PARAM_SCHEDULERS.build(dict(schedule, end=iterations), default_args=dict(optimizer=wrapper))
    assert not scheduler.by_epoch
    for i in range(iterations):
        expected = (2e-4 - 1e-6) * (1 - i / (iterations - 1)) ** 0.9 + 1e-6  # 1e-6 in the last iteration
        assert group['lr'] == pytest.approx(expected, rel=1e-6), i
        wrapper.optimizer.step()
        scheduler.step()


@every_config
def test_data(decoder, arch, data):
    cfg = read(decoder, arch, data)
    train = cfg.train_dataloader.dataset.pipeline
    assert [step.type for step in train] == [
        'LoadImageFromFile',
        'LoadAnnotations',
        'RandomResize',
        'RandomCrop',
        'RandomFlip',
        'PhotoMetricDistortion',
        'PackSegInputs',
    ]
    assert step(train, 'RandomResize') == dict(scale=SCALES[data], ratio_range=(0.5, 2.0), keep_ratio=True)
    assert step(train, 'RandomCrop') == dict(crop_size=CROPS[data], cat_max_ratio=0.75)
    assert step(train, 'RandomFlip') == dict(prob=0.5)
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        test = loader.dataset.pipeline
        assert step(test, 'Resize') == dict(scale=SCALES[data], keep_ratio=True)
        assert loader.batch_size == 1
        if data == 'ade20k':
            assert step(test, 'ResizeToMultiple') == dict(size_divisor=32)
        kinds = [step.type for step in test]
        assert kinds.index('LoadAnnotations') > kinds.index('Resize')
    assert cfg.train_dataloader.sampler.type == 'InfiniteSampler'
    assert cfg.val_evaluator.type == cfg.test_evaluator.type == 'IoUMetric'
    assert cfg.val_evaluator.iou_metrics == ['mIoU']

    dataset = DATASETS.build(dict(cfg.val_dataloader.dataset, lazy_init=True))
    assert len(dataset.metainfo['classes']) == CLASSES[data]
    assert dataset.metainfo['reduce_zero_label'] == (data == 'ade20k')


def test_all_configs_are_tested():
    names = {path.stem for path in CONFIGS.glob('*.py')}
    assert names == {f'{decoder}_evm_{arch}_{data}' for decoder, arch, data in NAMES}
