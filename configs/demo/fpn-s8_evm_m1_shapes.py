# Train a segmentor with EfficientViM-M1 from random weights on the data of `tools/make_shapes.py --label-maps`.
# `tools/demo.py segmentation` runs it, in minutes on two CPU cores. Also an example of a config for your own data.
_base_ = '../segmentation/fpn-s8_evm_m1_ade20k.py'

data_root = 'work_dirs/demo-segmentation/shapes/'
metainfo = dict(
    classes=('background', 'disk', 'box', 'triangle'), palette=[(0, 0, 0), (220, 20, 60), (0, 130, 200), (250, 190, 0)]
)

model = dict(
    data_preprocessor=dict(size=(192, 192)),
    backbone=dict(norm_eval=False, init_cfg=None),
    decode_head=dict(num_classes=4),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.75, direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PackSegInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
dataset = dict(_delete_=True, type='BaseSegDataset', data_root=data_root, img_suffix='.png', metainfo=metainfo)
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(
    loader,
    batch_size=8,
    dataset=dict(dataset, data_prefix=dict(img_path='train', seg_map_path='labels/train'), pipeline=train_pipeline),
)
val_dataloader = dict(
    loader, dataset=dict(dataset, data_prefix=dict(img_path='val', seg_map_path='labels/val'), pipeline=test_pipeline)
)
test_dataloader = val_dataloader

max_iters = 1600
train_cfg = dict(max_iters=max_iters, val_interval=400)
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=1))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='PolyLR', power=0.9, eta_min=1e-6, by_epoch=False, begin=100, end=max_iters),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=400, max_keep_ckpts=2))
