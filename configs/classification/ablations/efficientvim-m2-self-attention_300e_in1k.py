# Paper, Table C (D): self-attention replaces HSM-SSD. It has no hidden states, so there is no fusion.
_base_ = '../efficientvim-m2_300e_in1k.py'

model = dict(
    backbone=dict(mixer_cfg=dict(type='mmevm.SelfAttention', head_dim=32), out_hidden_states=False),
    head=dict(in_channels=[512]),
)
