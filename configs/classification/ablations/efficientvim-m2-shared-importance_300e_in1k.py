# Paper, Table C (F): single-head HSM-SSD with one importance weight per token, shared by all states.
_base_ = '../efficientvim-m2_300e_in1k.py'

model = dict(backbone=dict(mixer_cfg=dict(type='mmevm.MultiHeadHSMSSD', head_dim=None)))
