# rtmdet_evm_m4_bccd.py with a level of stride 8 upsampled from stride 16 instead of the stem's map.
_base_ = './rtmdet_evm_m1_bccd.py'

model = dict(
    backbone=dict(arch='m4', out_strides=(16, 32)),
    neck=dict(
        _delete_=True, type='mmevm.UpsampleFPN', in_channels=[224, 320], out_channels=96, num_outs=3, num_upsamples=1
    ),
)
