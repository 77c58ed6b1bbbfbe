# ImageNet schedule of the paper (Supplement A): AdamW at batch 2048, 20 warm-up epochs, cosine from 2e-3 to 2e-5,
# 10 cool-down epochs; 300 epochs in total.
train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict()
test_cfg = dict()

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0
    ),  # weight decay on matrices and kernels only
    clip_grad=dict(max_norm=0.02),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=True, begin=0, end=20, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=2e-5, by_epoch=True, begin=20, end=290),
]

# `tools/train.py --auto-scale-lr` scales the learning rate by (GPUs × batch size) / 2048.
auto_scale_lr = dict(enable=False, base_batch_size=2048)
