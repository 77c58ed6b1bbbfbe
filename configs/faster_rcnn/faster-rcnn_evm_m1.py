# Faster R-CNN with EfficientViM-M1 on COCO, 1x schedule. It has never been trained on COCO.
#
# What you will most likely change, in a config of your own that has this file as its `_base_`:
#   data:     train_dataloader.dataset and val_dataloader.dataset (data_root, ann_file, data_prefix, metainfo.classes),
#             val_evaluator.ann_file, and model.roi_head.bbox_head.num_classes
#   memory:   train_dataloader.batch_size, with `tools/train.py --auto-scale-lr`
#   weights:  model.backbone.init_cfg (None trains from random weights; then set norm_eval=False as well)
_base_ = './_base_/faster-rcnn_evm.py'

model = dict(
    backbone=dict(arch='m1', init_cfg=dict(checkpoint='timm://efficientvim_m1.e450_in1k')),
    neck=dict(in_channels=[32, 64, 128, 192, 320]),
)
