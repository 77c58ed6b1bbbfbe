# Semantic FPN with EfficientViM-M4 on Cityscapes: the authors' ADE20K recipe with crops of 1024×512 pixels.
_base_ = ['./_base_/fpn_evm.py', './_base_/cityscapes.py', './_base_/schedule_40k.py', './_base_/default_runtime.py']

model = dict(data_preprocessor=dict(size=(512, 1024)), decode_head=dict(num_classes=19))
