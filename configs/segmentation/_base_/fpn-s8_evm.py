# A finer decoder: the stem's map of stride 8 and those of the stages, levels of 128 channels, logits of stride 8.
_base_ = './fpn_evm.py'

model = dict(
    # For logits of stride 4: out_strides=(4, 8, 16, 32, 64), num_outs=5, and lists of five below.
    backbone=dict(out_strides=(8, 16, 32, 64)),
    neck=dict(in_channels=[112, 224, 320, 512], out_channels=128),
    decode_head=dict(in_channels=[128, 128, 128, 128], feature_strides=[8, 16, 32, 64]),
)
