# Semantic FPN as the authors trained it: MMSegmentation's FPN and FPNHead. The configs set num_classes and
# the size of the crops.
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(
        type='mmevm.EfficientViM',
        arch='m4',
        norm_eval=True,  # BatchNorm keeps ImageNet's statistics; its weights and biases are trained
        # The authors started from the 450-epoch weights that are not averaged; timm has the averaged ones.
        init_cfg=dict(type='Pretrained', checkpoint='timm://efficientvim_m4.e450_in1k'),
    ),
    # Levels of stride 16, 32 and 64, and one of stride 128 by max pooling.
    neck=dict(type='FPN', in_channels=[224, 320, 512], out_channels=256, num_outs=4),
    decode_head=dict(
        type='FPNHead',
        in_channels=[256, 256, 256, 256],
        in_index=[0, 1, 2, 3],
        # The authors' values. The real strides are four times these; only their ratios count. Logits have stride 16.
        feature_strides=[4, 8, 16, 32],
        channels=128,
        dropout_ratio=0.1,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
