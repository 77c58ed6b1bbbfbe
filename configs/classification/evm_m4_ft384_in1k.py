# EfficientViM-M4 fine-tuned at 384² for 30 epochs, from 300 epochs at 256² (paper, Sec. 4.2 and Table 5).
_base_ = [
    './_base_/evm_m4.py',
    './_base_/imagenet_384.py',
    './_base_/schedule_finetune_30e.py',
    './_base_/mesa_ema.py',
    'mmpretrain::_base_/default_runtime.py',
]

model = dict(init_cfg=dict(type='Pretrained', checkpoint='timm://efficientvim_m4.e300_in1k'))
