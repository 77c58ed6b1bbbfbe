# ImageNet-1k at 224² with RandAugment and random erasing, batch 8 GPUs × 256.
_base_ = 'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py'

data_root = 'data/imagenet'  # same as in the base; `--data-root DIR` replaces it
train_dataloader = dict(batch_size=256, num_workers=8)
