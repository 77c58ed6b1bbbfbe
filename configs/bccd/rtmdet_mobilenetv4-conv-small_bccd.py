# RTMDet-tiny's neck and head on timm's MobileNetV4-Conv-S, with the recipe of rtmdet_evm_m1_bccd.py.
_base_ = './rtmdet_evm_m1_bccd.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmpretrain.TIMMBackbone',
        model_name='mobilenetv4_conv_small',
        features_only=True,
        out_indices=(2, 3, 4),
    ),
    neck=dict(in_channels=[64, 96, 960]),
)
