# (J) of Table C: the same number of hidden states in each stage, in place of 49, 25, 9.
_base_ = '../evm_m2_in1k.py'

model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=(128, 256, 512), depths=(2, 2, 2), state_dims=(25, 25, 25))),
)
