# (I) of Table C: the number of hidden states rises from stage to stage, in place of 49, 25, 9.
_base_ = '../evm_m2_in1k.py'

model = dict(
    backbone=dict(arch=dict(_delete_=True, embed_dims=(128, 256, 512), depths=(2, 2, 2), state_dims=(9, 25, 49))),
)
