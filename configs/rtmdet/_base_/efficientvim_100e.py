# What RTMDet and RTMDet-Ins share: the backbone, the neck and the 100-epoch schedule. The schedule is that of
# `mmdet::rtmdet/rtmdet_l_convnext_b_4xb32-100e_coco.py`, mmdet's recipe for a backbone with ImageNet weights.
# The two detectors inherit from different configs of mmdet, so they take these values by `{{_base_.evm.…}}`.
evm = dict(
    # Of the maps of stride 8, 16 and 32. The configs of each size set these and their width.
    in_channels=dict(m1=[64, 128, 192], m2=[64, 128, 256], m3=[112, 224, 320], m4=[112, 224, 320]),
    model=dict(
        data_preprocessor=dict(  # the normalization that the ImageNet weights were trained with
            mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375],
            bgr_to_rgb=True,
            pad_size_divisor=32,  # the neck needs multiples of 32
        ),
        backbone=dict(
            _delete_=True,
            type='mmevm.EfficientViM',
            arch='m4',
            # The stem's map of stride 8, and those of two stages. On BCCD small objects were learned with it, and not
            # with a level of stride 8 upsampled from stride 16 (docs/results.md). RTMDet has no level for the third
            # stage, of stride 64: it is not built.
            out_strides=(8, 16, 32),
            norm_eval=False,  # trained, as the BatchNorm of RTMDet's own backbone
            init_cfg=dict(type='Pretrained', checkpoint='timm://efficientvim_m4.e450_in1k'),
        ),
        # mmdet's SyncBN cannot train in several processes on CPUs.
        neck=dict(norm_cfg=dict(type='BN')),
        bbox_head=dict(norm_cfg=dict(type='BN')),
    ),
    max_epochs=100,
    stage2_num_epochs=10,  # the last ones: without mosaic and mixup, and each is validated
    base_lr=1e-3,
    train_cfg=dict(max_epochs=100, dynamic_intervals=[(90, 1)]),
    switch_epoch=90,
    # mmdet's layer-wise learning rates are left out: they are written for ConvNeXt and do not support EfficientViM.
    optim_wrapper=dict(optimizer=dict(lr=1e-3)),
    param_scheduler=[
        dict(type='LinearLR', start_factor=1e-5, by_epoch=False, begin=0, end=1000),
        dict(
            type='CosineAnnealingLR',
            eta_min=5e-5,
            begin=50,
            end=100,
            T_max=50,
            by_epoch=True,
            convert_to_iter_based=True,
        ),
    ],
    ema_hook=dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=2e-4, update_buffers=True, priority=49),
    # For 4 GPUs × 32 images. The value that RTMDet inherits, 16, does not belong to its learning rate.
    auto_scale_lr=dict(enable=False, base_batch_size=128),
)
