# RTMDet-tiny's head on timm's SHViT-S1. timm returns its maps of stride 16 and 32 only, so the neck is that of
# rtmdet_evm_m1_upsample-fpn_bccd.py.
_base_ = './rtmdet_evm_m1_upsample-fpn_bccd.py'

model = dict(
    backbone=dict(
        _delete_=True, type='mmpretrain.TIMMBackbone', model_name='shvit_s1', features_only=True, out_indices=(0, 1)
    ),
    neck=dict(in_channels=[128, 224]),
)
