# The model's average (EMA) is what is evaluated, and what a checkpoint holds as its `state_dict`. From a quarter of the
# training on, the model also learns from it (MESA).
custom_hooks = [
    dict(type='EMAHook', momentum=0.0005, update_buffers=True),  # decay 0.9995
    dict(type='mmevm.MESAHook', begin=0.25),
]
