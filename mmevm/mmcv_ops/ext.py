"""The module imported as ``mmcv._ext``, with the names and signatures of mmcv's compiled operators.

mmcv allocates the outputs and passes them as arguments, and these functions write to them. They ignore the buffers and
tuning hints that mmcv passes as well.

Imports are absolute, because in a module named ``mmcv._ext`` relative imports refer to mmcv.
"""

import logging
from collections.abc import Callable
from typing import Any, NoReturn

from mmengine.logging import print_log

from mmevm.mmcv_ops.boxes import bbox_overlaps
from mmevm.mmcv_ops.carafe import carafe_backward, carafe_forward, carafe_naive_backward, carafe_naive_forward
from mmevm.mmcv_ops.deform_attn import ms_deform_attn_backward, ms_deform_attn_forward
from mmevm.mmcv_ops.deform_conv import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
)
from mmevm.mmcv_ops.deform_roi_pool import deform_roi_pool_backward, deform_roi_pool_forward
from mmevm.mmcv_ops.focal_loss import (
    sigmoid_focal_loss_backward,
    sigmoid_focal_loss_forward,
    softmax_focal_loss_backward,
    softmax_focal_loss_forward,
)
from mmevm.mmcv_ops.info import get_compiler_version, get_compiling_cuda_version
from mmevm.mmcv_ops.masked_conv import masked_col2im_forward, masked_im2col_forward
from mmevm.mmcv_ops.nms import line_nms_forward, nms, nms_match, softnms
from mmevm.mmcv_ops.roi import roi_align_backward, roi_align_forward, roi_pool_backward, roi_pool_forward
from mmevm.mmcv_ops.sync_bn import (
    sync_bn_backward_data,
    sync_bn_backward_param,
    sync_bn_forward_mean,
    sync_bn_forward_output,
    sync_bn_forward_var,
)

__all__ = [
    'bbox_overlaps',
    'carafe_backward',
    'carafe_forward',
    'carafe_naive_backward',
    'carafe_naive_forward',
    'deform_conv_backward_input',
    'deform_conv_backward_parameters',
    'deform_conv_forward',
    'deform_roi_pool_backward',
    'deform_roi_pool_forward',
    'get_compiler_version',
    'get_compiling_cuda_version',
    'line_nms_forward',
    'masked_col2im_forward',
    'masked_im2col_forward',
    'modulated_deform_conv_backward',
    'modulated_deform_conv_forward',
    'ms_deform_attn_backward',
    'ms_deform_attn_forward',
    'nms',
    'nms_match',
    'roi_align_backward',
    'roi_align_forward',
    'roi_pool_backward',
    'roi_pool_forward',
    'sigmoid_focal_loss_backward',
    'sigmoid_focal_loss_forward',
    'softmax_focal_loss_backward',
    'softmax_focal_loss_forward',
    'softnms',
    'sync_bn_backward_data',
    'sync_bn_backward_param',
    'sync_bn_forward_mean',
    'sync_bn_forward_output',
    'sync_bn_forward_var',
]


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith('__'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def not_implemented(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f'mmcv has no compiled operators, and the fallback operators of mmevm do not include {name!r} '
            '(docs/mmcv_ops.md lists them). Install an mmcv with compiled operators: a wheel for your versions of '
            'torch and CUDA, or a build from source with a C++ compiler, MMCV_WITH_OPS=1 and pip install '
            '--no-build-isolation.'
        )

    return not_implemented


print_log(
    "mmcv has no compiled operators; using mmevm's fallback operators (docs/mmcv_ops.md).",
    logger='current',
    level=logging.INFO,
)
