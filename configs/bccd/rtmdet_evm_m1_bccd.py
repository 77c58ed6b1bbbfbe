# RTMDet with EfficientViM-M1 on BCCD: photographs of blood cells, from random weights, in minutes on two CPU cores.
_base_ = '../rtmdet/rtmdet_evm_m1.py'

data_root = 'work_dirs/demo-photos/bccd/'
metainfo = dict(classes=('RBC', 'WBC', 'Platelets'), palette=[(220, 20, 60), (60, 100, 240), (250, 170, 30)])
image_size = (320, 240)
batch_size = 4  # with 8, some runs did not learn the platelets (docs/results.md)
epochs = 16

model = dict(backbone=dict(init_cfg=None), bbox_head=dict(num_classes=3))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomResize', scale=image_size, ratio_range=(0.7, 1.4), keep_ratio=True),
    dict(type='RandomCrop', crop_size=image_size),
    dict(type='RandomFlip', prob=0.75, direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1)),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_size, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'instances')),
]
dataset = dict(
    _delete_=True,
    type='XMLDataset',
    data_root=data_root,
    data_prefix=dict(sub_data_root=''),
    metainfo=metainfo,
)
test_dataset = dict(dataset, test_mode=True, pipeline=test_pipeline)
loader = dict(batch_size=batch_size, num_workers=0, persistent_workers=False)
train_dataloader = dict(
    loader,
    dataset=dict(
        dataset,
        ann_file='ImageSets/Main/train.txt',
        filter_cfg=dict(filter_empty_gt=True, min_size=32),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(loader, dataset=dict(test_dataset, ann_file='ImageSets/Main/val.txt'))
test_dataloader = dict(loader, dataset=dict(test_dataset, ann_file='ImageSets/Main/test.txt'))
val_evaluator = dict(_delete_=True, type='CocoMetric', metric='bbox', classwise=True)
test_evaluator = val_evaluator

train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=4)
auto_scale_lr = dict(base_batch_size=batch_size)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', eta_min=1e-5, begin=0, end=epochs, T_max=epochs, convert_to_iter_based=True),
]
# COCO's momentum, 2e-4, would average over the 5,000 last iterations; there are 832.
custom_hooks = [
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=2e-3, gamma=100, update_buffers=True, priority=49),
]
default_hooks = dict(
    logger=dict(interval=26),
    checkpoint=dict(interval=4, max_keep_ckpts=1),
    visualization=dict(score_thr=0.4),  # of drawn objects
)
