# (F) of Table C: a single head as in the base, but one importance per token, shared by the states.
_base_ = '../evm_m2_in1k.py'

model = dict(backbone=dict(mixer_cfg=dict(type='mmevm.MultiHeadHSMSSD', head_dim=None)))
