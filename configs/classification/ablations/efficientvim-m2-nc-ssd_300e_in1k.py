# Paper, Table C (C): NC-SSD replaces HSM-SSD. There is no fusion: the parameter count of the paper requires it.
_base_ = '../efficientvim-m2_300e_in1k.py'

model = dict(
    backbone=dict(mixer_cfg=dict(type='mmevm.NCSSD', head_dim=32), out_hidden_states=False),
    head=dict(in_channels=[512]),
)
