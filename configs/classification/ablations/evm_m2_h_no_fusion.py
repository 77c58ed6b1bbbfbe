# (H) of Table C: no fusion, a classifier on the last map alone.
_base_ = '../evm_m2_in1k.py'

model = dict(
    backbone=dict(out_hidden_states=False),
    head=dict(in_channels=[512]),
)
