# Hard distillation from RegNetY-160, the teacher of DeiT. Replaces MESA.
custom_hooks = [
    dict(type='EMAHook', momentum=0.0005, update_buffers=True),  # decay 0.9995
    dict(
        type='mmevm.DistillationHook',
        teacher=dict(type='mmpretrain.TimmClassifier', model_name='regnety_160.deit_in1k', pretrained=True),
    ),
]
