# Mask R-CNN with EfficientViM-M4 on COCO, 1x schedule (paper, Supplement B and Table B).
#
# What you will most likely change in your own config with `_base_ = 'mmevm::maskrcnn_evm_m4.py'`:
#   data:     train_dataloader.dataset and val_dataloader.dataset (data_root, ann_file, data_prefix, metainfo.classes),
#             val_evaluator.ann_file, and the two num_classes of model.roi_head
#   memory:   train_dataloader.batch_size, with `tools/train.py --auto-scale-lr`
#   weights:  model.backbone.init_cfg (None trains from random weights; then set norm_eval=False as well)
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/default_runtime.py',
    './_base_/schedule_1x_adamw.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='mmevm.EfficientViM',
        arch='m4',
        norm_eval=True,  # BatchNorm keeps ImageNet's statistics; its weights and biases are trained
        init_cfg=dict(type='Pretrained', checkpoint='timm://efficientvim_m4.e450_in1k'),
    ),
    # The backbone returns strides 16, 32, 64; the anchors are made for strides 4, 8, 16, 32, 64.
    neck=dict(
        _delete_=True,
        type='mmevm.UpsampleFPN',
        in_channels=[224, 320, 512],
        out_channels=256,
        num_outs=5,
        num_upsamples=2,
    ),
)

train_dataloader = dict(batch_size=16, num_workers=8)  # for one GPU; use batch_size=2 on eight
