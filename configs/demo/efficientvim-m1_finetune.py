# Fine-tune EfficientViM-M1 on your own images, with one folder per class: data/own/{train,val}/CLASS/*.
# Copy this file and change the first three settings.
_base_ = 'mmevm::classification/efficientvim-m1_300e_in1k.py'

data_root = 'data/own'
num_classes = 10
max_epochs = 30

model = dict(
    init_cfg=dict(type='Pretrained', checkpoint='timm://efficientvim_m1.e450_in1k'),
    head=dict(num_classes=num_classes, topk=(1,)),  # the linear classifiers start from random weights
)
data_preprocessor = dict(num_classes=num_classes)
train_dataloader = dict(
    batch_size=64,
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root=data_root,
        data_prefix='train',
        pipeline=_base_.train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root=data_root,
        data_prefix='val',
        pipeline=_base_.test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(topk=(1,))
test_evaluator = val_evaluator

train_cfg = dict(max_epochs=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
auto_scale_lr = dict(base_batch_size=64)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=True, begin=0, end=2, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=2e-6, by_epoch=True, begin=2, end=max_epochs, convert_to_iter_based=True),
]
custom_hooks = [
    # The EMA of ImageNet averages thousands of iterations. In a short training it would contain the random classifiers,
    # so the momentum is larger in the first iterations.
    dict(type='EMAHook', ema_type='MomentumAnnealingEMA', momentum=0.0005, update_buffers=True),
    dict(type='mmevm.MESAHook', begin=0.25),
]
