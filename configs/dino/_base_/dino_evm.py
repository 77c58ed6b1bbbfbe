# DINO with EfficientViM on COCO, 12 epochs. It has never been trained on COCO.
# Transformer, losses, augmentation and schedule are mmdet's.
_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmevm.EfficientViM',
        arch='m4',
        norm_eval=True,  # BatchNorm keeps ImageNet's statistics; its weights and biases are trained
        init_cfg=dict(type='Pretrained', checkpoint='timm://efficientvim_m4.e450_in1k'),
    ),
    # The backbone's strides are 16, 32, 64; the stock model's are 8, 16, 32, 64. GroupNorm as in the stock neck.
    neck=dict(
        _delete_=True,
        type='mmevm.UpsampleFPN',
        in_channels=[224, 320, 512],
        out_channels=256,
        num_outs=4,
        num_upsamples=1,
        norm_cfg=dict(type='GN', num_groups=32),
    ),
)
