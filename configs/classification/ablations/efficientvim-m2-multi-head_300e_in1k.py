# Paper, Table C (E): multi-head HSM-SSD with one importance weight per token and head instead of per token and state.
_base_ = '../efficientvim-m2_300e_in1k.py'

model = dict(backbone=dict(mixer_cfg=dict(type='mmevm.MultiHeadHSMSSD', head_dim=32)))
