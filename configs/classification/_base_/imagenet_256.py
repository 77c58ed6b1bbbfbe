_base_ = 'mmpretrain::_base_/datasets/imagenet_bs64_swin_256.py'

train_dataloader = dict(batch_size=256, num_workers=8)
