# Train EfficientViM-M1 from random weights on the digits of tools/make_digits.py, with MESA, EMA and mixup as on
# ImageNet. `make demo-classification` runs it, in minutes on two CPU cores. Also an example of a config for your own
# data.
_base_ = '../classification/efficientvim-m1_300e_in1k.py'

data_root = 'work_dirs/demo-classification/digits/'
num_classes = 10

model = dict(
    head=dict(num_classes=num_classes, topk=(1,)),
    # Half of the batches are not mixed, because a short training needs some plain images.
    train_cfg=dict(probs=[0.25, 0.25]),
)
data_preprocessor = dict(num_classes=num_classes)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=64, crop_ratio_range=(0.6, 1.0), interpolation='bicubic'),
    dict(type='Rotate', angle=10, prob=0.5),
    dict(type='RandomErasing', erase_prob=0.25, mode='rand'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=64, interpolation='bicubic'),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True, type='CustomDataset', data_root=data_root, data_prefix='train', pipeline=train_pipeline
    ),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(_delete_=True, type='CustomDataset', data_root=data_root, data_prefix='val', pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator

max_epochs = 15
train_cfg = dict(max_epochs=max_epochs, val_interval=3)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=True, begin=0, end=3, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=2e-5, by_epoch=True, begin=3, end=max_epochs, convert_to_iter_based=True),
]
custom_hooks = [
    # The 0.0005 of ImageNet would average over more iterations than this training has.
    dict(type='EMAHook', momentum=0.1, update_buffers=True),
    dict(type='mmevm.MESAHook', begin=0.25),
]
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=3, max_keep_ckpts=2),
    visualization=dict(rescale_factor=4),  # predictions are drawn with 256² pixels
)
