# RTMDet-Ins with EfficientViM-M3 on COCO, 100 epochs at 640×640. It has never been trained on COCO.
#
# What you will most likely change, in a config of your own that has this file as its `_base_`:
#   data:     train_dataloader.dataset and val_dataloader.dataset (data_root, ann_file, data_prefix, metainfo.classes),
#             val_evaluator.ann_file, and model.bbox_head.num_classes
#   memory:   train_dataloader.batch_size (32, for 4 GPUs), with `tools/train.py --auto-scale-lr`
#   epochs:   train_cfg (max_epochs, dynamic_intervals), param_scheduler and switch_epoch in custom_hooks
#   weights:  model.backbone.init_cfg (None trains from random weights)
_base_ = './_base_/rtmdet-ins_evm.py'

model = dict(
    backbone=dict(arch='m3', init_cfg=dict(checkpoint='timm://efficientvim_m3.e450_in1k')),
    neck=dict(in_channels={{_base_.evm.in_channels.m3}}, out_channels=128, num_csp_blocks=1),
    bbox_head=dict(in_channels=128, feat_channels=128),
)
