# Faster R-CNN with EfficientViM on COCO, 1x schedule: `maskrcnn_evm_m4.py` without masks and with the stock
# neck. It has never been trained on COCO.
_base_ = [
    'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    'mmdet::_base_/default_runtime.py',
    '../../_base_/schedule_1x_adamw.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmevm.EfficientViM',
        arch='m4',
        # Two maps of the stem and those of the three stages: the strides of the stock FPN and anchors. On BCCD small
        # objects were learned with maps of the stem, and not with levels upsampled from stride 16 (docs/results.md).
        out_strides=(4, 8, 16, 32, 64),
        norm_eval=True,  # BatchNorm keeps ImageNet's statistics; its weights and biases are trained
        init_cfg=dict(type='Pretrained', checkpoint='timm://efficientvim_m4.e450_in1k'),
    ),
    neck=dict(in_channels=[56, 112, 224, 320, 512]),
)

train_dataloader = dict(batch_size=16, num_workers=8)  # for one GPU; `batch_size=2` for eight
