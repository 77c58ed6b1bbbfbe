# (C) of Table C: NC-SSD in place of HSM-SSD, and no fusion: only so are the parameters those of the paper.
_base_ = '../evm_m2_in1k.py'

model = dict(
    backbone=dict(mixer_cfg=dict(type='mmevm.NCSSD', head_dim=32), out_hidden_states=False),
    head=dict(in_channels=[512]),
)
