_base_ = './maskrcnn_evm_m4.py'

model = dict(
    backbone=dict(arch='m3', init_cfg=dict(checkpoint='timm://efficientvim_m3.e450_in1k')),
)
