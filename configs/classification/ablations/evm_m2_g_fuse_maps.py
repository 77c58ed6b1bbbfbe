# (G) of Table C: the stages' maps are fused in place of their hidden states.
_base_ = '../evm_m2_in1k.py'

model = dict(
    backbone=dict(out_indices=(0, 1, 2), out_hidden_states=False),
    head=dict(in_channels=[128, 256, 512]),
)
