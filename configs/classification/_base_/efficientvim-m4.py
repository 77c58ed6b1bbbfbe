_base_ = './efficientvim-m1.py'

model = dict(backbone=dict(arch='m4'), head=dict(in_channels=[224, 320, 512, 512]))
