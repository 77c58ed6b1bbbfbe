"""Operators must create tensors on the device of their inputs, not on the default device."""

from collections.abc import Callable

import pytest
import torch
from mmcv.ops import (
    MaskedConv2d,
    deform_roi_pool,
    nms_match,
    roi_align,
    roi_pool,
    sigmoid_focal_loss,
    soft_nms,
    softmax_focal_loss,
)
from torch import Tensor

from mmevm.mmcv_ops.ext import line_nms_forward, roi_align_backward, softmax_focal_loss_backward


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    result = function(x.requires_grad_())
    return result.detach(), torch.autograd.grad((result**2).sum(), x)[0]


def softmax_focal_loss_gradient(x: dict[str, Tensor]) -> Tensor:
    """Call the operator directly, because autograd threads ignore the default device. So does the next function."""
    grad, buff = torch.zeros_like(x['logits']), torch.zeros_like(x['scores'])
    softmax_focal_loss_backward(
        x['logits'].softmax(dim=1), x['classes'], x['logits'].new_empty(0), buff, grad, gamma=2.0, alpha=0.25
    )
    return grad


def roi_align_gradient(x: dict[str, Tensor]) -> Tensor:
    grad, argmax = torch.zeros_like(x['maps']), x['maps'].new_ones(20, 2, 2, 2)
    roi_align_backward(
        torch.ones_like(argmax),
        x['rois'],
        argmax,
        argmax,
        grad,
        aligned_height=2,
        aligned_width=2,
        spatial_scale=1.0,
        sampling_ratio=2,
        pool_mode=0,
        aligned=True,
    )
    return grad


def inputs() -> dict[str, Tensor]:
    corners = torch.rand(20, 2) * 6
    boxes = torch.cat([corners, corners + torch.rand(20, 2) * 6 + 1], dim=1)
    return dict(
        maps=torch.rand(1, 2, 9, 8),
        boxes=boxes,
        scores=torch.rand(20),
        rois=torch.cat([torch.zeros(20, 1), boxes], dim=1),
        logits=torch.randn(20, 5),
        classes=torch.randint(0, 5, (20,)),
        offset=torch.randn(20, 2, 3, 2),
        mask=torch.rand(1, 9, 8) > 0.6,
        lanes=torch.rand(20, 5 + 12),
    )


MASKED = MaskedConv2d(2, 3, 3, padding=1).requires_grad_(False)
OPERATORS = {
    'sigmoid_focal_loss': lambda x: with_gradient(lambda y: sigmoid_focal_loss(y, x['classes']), x['logits']),
    'softmax_focal_loss': lambda x: with_gradient(lambda y: softmax_focal_loss(y, x['classes']), x['logits']),
    'masked_conv2d': lambda x: MASKED(x['maps'], x['mask']),
    'soft_nms': lambda x: soft_nms(x['boxes'], x['scores'], 0.3),
    'soft_nms of no boxes': lambda x: soft_nms(x['boxes'][:0], x['scores'][:0], 0.3),
    'nms_match': lambda x: nms_match(torch.cat([x['boxes'], x['scores'][:, None]], dim=1), 0.3),
    'line_nms': lambda x: line_nms_forward(x['lanes'], x['scores'], 5.0, 10),
    'roi_align': lambda x: with_gradient(lambda y: roi_align(y, x['rois'], 2, 1.0, 2, 'max'), x['maps']),
    'softmax_focal_loss backward': softmax_focal_loss_gradient,
    'roi_align backward': roi_align_gradient,
    'roi_pool': lambda x: with_gradient(lambda y: roi_pool(y, x['rois'], 2), x['maps']),
    'deform_roi_pool': lambda x: with_gradient(
        lambda y: deform_roi_pool(y, x['rois'], x['offset'], (3, 2), 1.0, 2), x['maps']
    ),
}


@pytest.mark.parametrize('operator', OPERATORS)
def test_result_does_not_depend_on_default_device(operator: str) -> None:
    given = inputs()
    expected = OPERATORS[operator](given)
    with torch.device('meta'):
        result = OPERATORS[operator](given)
    torch.testing.assert_close(result, expected)
