# (D) of Table C: self-attention in place of HSM-SSD, which has no hidden states that could be fused.
_base_ = '../evm_m2_in1k.py'

model = dict(
    backbone=dict(mixer_cfg=dict(type='mmevm.SelfAttention', head_dim=32), out_hidden_states=False),
    head=dict(in_channels=[512]),
)
