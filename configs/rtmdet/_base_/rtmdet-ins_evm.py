# RTMDet-Ins with EfficientViM on COCO at 640×640. It has never been trained on COCO.
# Head, losses, assigner, augmentation, batch size, weight decay and test settings are mmdet's.
_base_ = [
    'mmdet::rtmdet/rtmdet-ins_l_8xb32-300e_coco.py',
    './efficientvim_100e.py',
]

model = {{_base_.evm.model}}

max_epochs = {{_base_.evm.max_epochs}}
stage2_num_epochs = {{_base_.evm.stage2_num_epochs}}
base_lr = {{_base_.evm.base_lr}}
train_cfg = {{_base_.evm.train_cfg}}
optim_wrapper = {{_base_.evm.optim_wrapper}}
param_scheduler = {{_base_.evm.param_scheduler}}
auto_scale_lr = {{_base_.evm.auto_scale_lr}}
custom_hooks = [
    {{_base_.evm.ema_hook}},
    dict(
        type='PipelineSwitchHook',
        switch_epoch={{_base_.evm.switch_epoch}},
        switch_pipeline={{_base_.train_pipeline_stage2}},
    ),
]
