# rtmdet_evm_m1_bccd.py with the backbone's BatchNorm in eval mode, as if its weights were pretrained.
_base_ = '../rtmdet_evm_m1_bccd.py'

model = dict(backbone=dict(norm_eval=True))
