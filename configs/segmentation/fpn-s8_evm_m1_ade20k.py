_base_ = './fpn-s8_evm_m4_ade20k.py'

model = dict(
    backbone=dict(arch='m1', init_cfg=dict(checkpoint='timm://efficientvim_m1.e450_in1k')),
    neck=dict(in_channels=[64, 128, 192, 320]),
)
