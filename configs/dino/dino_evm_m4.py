# DINO with EfficientViM-M4 on COCO, 12 epochs. It has never been trained on COCO.
#
# What you will most likely change, in a config of your own that has this file as its `_base_`:
#   data:     train_dataloader.dataset and val_dataloader.dataset (data_root, ann_file, data_prefix, metainfo.classes),
#             val_evaluator.ann_file, and model.bbox_head.num_classes
#   memory:   train_dataloader.batch_size (2, for eight GPUs), with `tools/train.py --auto-scale-lr`
#   weights:  model.backbone.init_cfg (None trains from random weights; then set norm_eval=False as well, and
#             optim_wrapper.paramwise_cfg.custom_keys.backbone.lr_mult=1)
_base_ = './_base_/dino_evm.py'

model = dict(
    backbone=dict(arch='m4', init_cfg=dict(checkpoint='timm://efficientvim_m4.e450_in1k')),
    neck=dict(in_channels=[224, 320, 512]),
)
