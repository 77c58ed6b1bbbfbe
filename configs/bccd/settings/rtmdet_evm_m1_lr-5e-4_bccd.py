# rtmdet_evm_m1_bccd.py with half the learning rate.
_base_ = '../rtmdet_evm_m1_bccd.py'

optim_wrapper = dict(optimizer=dict(lr=5e-4))
