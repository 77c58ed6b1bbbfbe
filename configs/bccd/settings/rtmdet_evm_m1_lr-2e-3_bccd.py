# rtmdet_evm_m1_bccd.py with double the learning rate.
_base_ = '../rtmdet_evm_m1_bccd.py'

optim_wrapper = dict(optimizer=dict(lr=2e-3))
