# (L) of Table C: BatchNorm everywhere, before the mixers and in the head too, in place of LayerNorm.
_base_ = '../evm_m2_in1k.py'

model = dict(
    backbone=dict(mixer_norm_cfg=dict(type='BN')),
    head=dict(norm_cfg=dict(type='BN')),
)
