# EfficientViM-M4 on ImageNet-1k: 30 epochs of fine-tuning at 512² from the checkpoint of
# efficientvim-m4_ft30e_in1k-384px.py (paper, Section 4.2 and Table 5).
_base_ = [
    './_base_/efficientvim-m4.py',
    './_base_/imagenet_512.py',
    './_base_/schedule_finetune_30e.py',
    './_base_/mesa_ema.py',
    'mmpretrain::_base_/default_runtime.py',
]

model = dict(init_cfg=dict(type='Pretrained', checkpoint='work_dirs/efficientvim-m4_ft30e_in1k-384px/epoch_30.pth'))
