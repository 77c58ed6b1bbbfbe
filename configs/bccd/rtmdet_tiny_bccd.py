# Stock RTMDet-tiny (CSPNeXt) with the recipe of rtmdet_evm_m1_bccd.py.
_base_ = './rtmdet_evm_m1_bccd.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='CSPNeXt',
        arch='P5',
        deepen_factor=0.167,
        widen_factor=0.375,
        channel_attention=True,
        norm_cfg=dict(type='BN'),
        act_cfg=dict(type='SiLU', inplace=True),
    ),
    neck=dict(in_channels=[96, 192, 384]),
)
