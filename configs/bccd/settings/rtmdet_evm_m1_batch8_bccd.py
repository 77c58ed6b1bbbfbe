# rtmdet_evm_m1_bccd.py with batches of 8 images: half the iterations in as many epochs.
_base_ = '../rtmdet_evm_m1_bccd.py'

train_dataloader = dict(batch_size=8)
