# RTMDet with EfficientViM-M1 on photographs of blood cells, for `make demo-photos`: the recipe of configs/bccd with 24
# epochs instead of 16.
_base_ = '../bccd/rtmdet_evm_m1_bccd.py'

epochs = 24

train_cfg = dict(max_epochs=epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', eta_min=1e-5, begin=0, end=epochs, T_max=epochs, convert_to_iter_based=True),
]
