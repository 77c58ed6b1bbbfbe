_base_ = './fpn-s8_evm_m4_ade20k.py'

model = dict(
    backbone=dict(arch='m3', init_cfg=dict(checkpoint='timm://efficientvim_m3.e450_in1k')),
    neck=dict(in_channels=[112, 224, 320, 512]),
)
