# Paper, Table C (L): BatchNorm replaces LayerNorm before the mixers and in the head.
_base_ = '../efficientvim-m2_300e_in1k.py'

model = dict(
    backbone=dict(mixer_norm_cfg=dict(type='BN')),
    head=dict(norm_cfg=dict(type='BN')),
)
