# EfficientViM-M4 on ImageNet-1k: 30 epochs of fine-tuning at 384² from the 300-epoch weights (paper, Section 4.2 and
# Table 5).
_base_ = [
    './_base_/efficientvim-m4.py',
    './_base_/imagenet_384.py',
    './_base_/schedule_finetune_30e.py',
    './_base_/mesa_ema.py',
    'mmpretrain::_base_/default_runtime.py',
]

model = dict(init_cfg=dict(type='Pretrained', checkpoint='timm://efficientvim_m4.e300_in1k'))
