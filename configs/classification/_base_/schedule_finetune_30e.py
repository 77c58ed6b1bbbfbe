# Fine-tuning at a higher resolution (paper, Supplement A): batch 1024, 30 epochs, cosine from 1e-3.
_base_ = './schedule_300e.py'

train_cfg = dict(max_epochs=30)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [dict(type='CosineAnnealingLR', eta_min=2e-5, by_epoch=True, begin=0, end=30)]
auto_scale_lr = dict(base_batch_size=1024)
