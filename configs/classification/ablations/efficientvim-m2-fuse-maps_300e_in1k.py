# Paper, Table C (G): the head fuses the feature maps of the stages instead of their hidden states.
_base_ = '../efficientvim-m2_300e_in1k.py'

model = dict(
    backbone=dict(out_indices=(0, 1, 2), out_hidden_states=False),
    head=dict(in_channels=[128, 256, 512]),
)
