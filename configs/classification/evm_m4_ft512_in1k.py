# EfficientViM-M4 fine-tuned at 512² for 30 epochs, from what evm_m4_ft384_in1k.py leaves (paper, Sec. 4.2 and Table 5).
_base_ = [
    './_base_/evm_m4.py',
    './_base_/imagenet_512.py',
    './_base_/schedule_finetune_30e.py',
    './_base_/mesa_ema.py',
    'mmpretrain::_base_/default_runtime.py',
]

model = dict(init_cfg=dict(type='Pretrained', checkpoint='work_dirs/evm_m4_ft384_in1k/epoch_30.pth'))
