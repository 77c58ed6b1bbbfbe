# EfficientViM-M4 with a map of its stem and logits of stride 8 on Cityscapes, trained as fpn_evm_m4_cityscapes.py.
_base_ = ['./_base_/fpn-s8_evm.py', './_base_/cityscapes.py', './_base_/schedule_40k.py', './_base_/default_runtime.py']

model = dict(data_preprocessor=dict(size=(512, 1024)), decode_head=dict(num_classes=19))
