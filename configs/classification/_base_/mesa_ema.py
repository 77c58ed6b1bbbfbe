# MESA and an exponential moving average (EMA) of the weights. The EMA model is evaluated and saved as the
# `state_dict` of a checkpoint. After a quarter of the training, its predictions are additional targets (MESA).
custom_hooks = [
    dict(type='EMAHook', momentum=0.0005, update_buffers=True),  # decay 0.9995
    dict(type='mmevm.MESAHook', begin=0.25),
]
