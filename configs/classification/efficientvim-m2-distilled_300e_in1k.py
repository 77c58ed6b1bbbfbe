# EfficientViM-M2 on ImageNet-1k: 300 epochs with hard distillation from RegNetY-160 (paper, Section 4.2 and Table 6).
_base_ = [
    './_base_/efficientvim-m2.py',
    './_base_/imagenet_224.py',
    './_base_/schedule_300e.py',
    './_base_/distill_regnety160.py',
    'mmpretrain::_base_/default_runtime.py',
]

model = dict(head=dict(distilled=True))
