# RTMDet-tiny's neck and head on EfficientViM-M4, with the recipe of rtmdet_evm_m1_bccd.py.
_base_ = './rtmdet_evm_m1_bccd.py'

model = dict(backbone=dict(arch='m4'), neck=dict(in_channels=[112, 224, 320]))
