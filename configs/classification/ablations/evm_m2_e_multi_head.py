# (E) of Table C: several heads, each with one importance per token, in place of one importance per token and state.
_base_ = '../evm_m2_in1k.py'

model = dict(backbone=dict(mixer_cfg=dict(type='mmevm.MultiHeadHSMSSD', head_dim=32)))
