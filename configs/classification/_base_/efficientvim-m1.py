# EfficientViM-M1 classifier: the head fuses the hidden states of the three stages and the last feature map.
model = dict(
    type='mmevm.DistillationClassifier',  # ImageClassifier with an optional distillation teacher
    backbone=dict(type='mmevm.EfficientViM', arch='m1', out_indices=(2,), out_hidden_states=True),
    head=dict(
        type='mmevm.FusionClsHead',
        num_classes=1000,
        in_channels=[128, 192, 320, 320],
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
        topk=(1, 5),
    ),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
