"""Configs of MMDetection: one training step and one inference step each."""

import mmengine
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.hub import get_config

# Config, and part of the name of parameters that must receive a gradient through the operator.
CASES = [
    ('dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py', 'conv_offset'),
    ('dcn/faster-rcnn_r50_fpn_dpool_1x_coco.py', 'offset_fc'),
    ('dcnv2/faster-rcnn_r50-mdconv-group4-c3-c5_fpn_1x_coco.py', 'conv_offset'),
    ('carafe/mask-rcnn_r50_fpn-carafe_1x_coco.py', 'content_encoder'),
    ('guided_anchoring/ga-faster-rcnn_r50_fpn_1x_coco.py', 'feature_adaption'),
    pytest.param(
        'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
        'sampling_offsets',
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='mmcv uses the operator on a GPU only'),
    ),
]


def make_small(node: mmengine.ConfigDict) -> None:
    """Limit the number of proposals, so that a step takes seconds on one core."""
    for key, value in node.items():
        if key in ('max_per_img', 'nms_pre', 'nms_post') and isinstance(value, int):
            node[key] = min(value, 20)
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, mmengine.ConfigDict):
                make_small(child)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'part'), CASES)
def test_stock_detector_trains_and_detects(name: str, part: str) -> None:
    register_all_modules()
    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    cfg = get_config(f'mmdet::{name}').model
    cfg.backbone.init_cfg = None
    make_small(cfg)
    model = MODELS.build(cfg).to(device)
    data = demo_mm_inputs(2, (3, 128, 96), num_items=[3, 2], with_mask='mask' in name, device=device)

    model.train()
    losses, _ = model.parse_losses(model.forward(**model.data_preprocessor(data, True), mode='loss'))
    losses.backward()
    grads = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert losses.isfinite()
    assert all(grad.isfinite().all() for grad in grads.values())
    assert any(grad.any() for key, grad in grads.items() if part in key)

    one = demo_mm_inputs(1, (3, 128, 96), device=device)  # mmcv's masked convolution accepts one image only
    model.eval()
    with torch.no_grad():
        (result,) = model.forward(**model.data_preprocessor(one, False), mode='predict')
    assert result.pred_instances.bboxes.isfinite().all()
