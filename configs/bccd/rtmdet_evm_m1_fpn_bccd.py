# rtmdet_evm_m1_bccd.py with the same three maps of the backbone and a plain FPN, which has no path from fine to coarse.
_base_ = './rtmdet_evm_m1_bccd.py'

model = dict(
    neck=dict(_delete_=True, type='FPN', in_channels=[64, 128, 192], out_channels=96, num_outs=3),
)
