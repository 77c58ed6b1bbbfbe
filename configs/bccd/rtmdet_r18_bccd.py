# RTMDet-tiny's neck and head on ResNet-18, with the recipe of rtmdet_evm_m1_bccd.py.
_base_ = './rtmdet_evm_m1_bccd.py'

model = dict(
    backbone=dict(
        _delete_=True, type='ResNet', depth=18, out_indices=(1, 2, 3), norm_cfg=dict(type='BN'), norm_eval=False
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
