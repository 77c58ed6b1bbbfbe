_base_ = 'mmpretrain::_base_/datasets/imagenet_bs64_swin_256.py'

data_root = 'data/imagenet'  # same as in the base; `--data-root DIR` replaces it
train_dataloader = dict(batch_size=256, num_workers=8)
