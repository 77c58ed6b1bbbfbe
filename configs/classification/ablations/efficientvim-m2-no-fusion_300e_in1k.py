# Paper, Table C (H): no fusion; the head classifies the last feature map.
_base_ = '../efficientvim-m2_300e_in1k.py'

model = dict(
    backbone=dict(out_hidden_states=False),
    head=dict(in_channels=[512]),
)
