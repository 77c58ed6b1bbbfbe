# Semantic FPN with EfficientViM-M4 on ADE20K: the recipe of the authors' code, 40,000 iterations of 32 images.
#
# What you will most likely change in your own config with `_base_ = 'mmevm::segmentation/fpn_evm_m4_ade20k.py'`:
#   data:     train_dataloader.dataset and val_dataloader.dataset (type='BaseSegDataset', data_root, data_prefix,
#             metainfo.classes, reduce_zero_label), and model.decode_head.num_classes
#   memory:   train_dataloader.batch_size, with `tools/train.py --auto-scale-lr`
#   weights:  model.backbone.init_cfg (None trains from random weights; then set norm_eval=False as well)
_base_ = ['./_base_/fpn_evm.py', './_base_/ade20k.py', './_base_/schedule_40k.py', './_base_/default_runtime.py']

model = dict(data_preprocessor=dict(size=(512, 512)), decode_head=dict(num_classes=150))
