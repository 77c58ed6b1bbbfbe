# EfficientViM-M1 on ImageNet-1k: 450 epochs (paper, Table 3 and Supplement A).
_base_ = [
    './_base_/efficientvim-m1.py',
    './_base_/imagenet_224.py',
    './_base_/schedule_450e.py',
    './_base_/mesa_ema.py',
    'mmpretrain::_base_/default_runtime.py',
]
