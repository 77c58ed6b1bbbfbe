# What MMSegmentation's default_runtime.py sets. Without mmevm, onedl-mmengine cannot inherit from that: it looks for
# `mmseg::` in the package mmsegmentation, but that of onedl is called onedl-mmsegmentation.
default_scope = 'mmseg'
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(type='SegLocalVisualizer', vis_backends=vis_backends, alpha=0.6)
log_processor = dict(by_epoch=False)
log_level = 'INFO'
load_from = None
resume = False
