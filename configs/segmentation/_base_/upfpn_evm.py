# A finer decoder: levels of stride 8, 16, 32 and 64 with 128 channels, and logits of stride 8.
_base_ = './fpn_evm.py'

model = dict(
    neck=dict(
        _delete_=True,
        type='mmevm.UpsampleFPN',
        in_channels=[224, 320, 512],
        out_channels=128,
        num_outs=4,
        num_upsamples=1,  # for logits of stride 4: num_upsamples=2, num_outs=5, and lists of five in the head
    ),
    decode_head=dict(in_channels=[128, 128, 128, 128], feature_strides=[8, 16, 32, 64]),
)
