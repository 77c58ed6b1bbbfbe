# Paper, Table C (J): 25 hidden states in each stage instead of 49, 25, 9.
_base_ = '../efficientvim-m2_300e_in1k.py'

model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=(128, 256, 512), depths=(2, 2, 2), state_dims=(25, 25, 25))),
)
