_base_ = './efficientvim-m1.py'

model = dict(backbone=dict(arch='m2'), head=dict(in_channels=[128, 256, 512, 512]))
