"""Non-maximum suppression for batches: an operator of PyTorch that becomes ONNX's ``NonMaxSuppression``.

``torchvision.ops.nms`` takes one image and returns as many indices as boxes remain. The size of such a result depends
on the values, which the exporter can hardly follow. This operator takes a batch and returns a mask of what remains.
"""

from typing import Any

import torch
import torchvision.ops
from torch import Tensor

# Not `torch.library.custom_op`, which PyTorch has since 2.4 only.
_LIBRARY = torch.library.Library('mmevm', 'DEF')
_LIBRARY.define('nms(Tensor boxes, Tensor scores, float iou_threshold, int count) -> Tensor')


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, count: int) -> Tensor:
    """Return which boxes are the ``count`` best of an image that no better one overlaps by more than ``iou_threshold``.

    Args:
        boxes: x1, y1, x2, y2, shape (B, M, 4).
        scores: (B, M). Boxes with a score of 0 are not considered: the result does not hold for them.
        iou_threshold: Between 0 and 1.
        count: Number of boxes to keep in each image. ONNX Runtime stops there, which saves most of its time.

    Returns:
        Boolean mask, (B, M).
    """
    return torch.ops.mmevm.nms(boxes, scores, iou_threshold, count)


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float, count: int) -> Tensor:
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for image, (rows, values) in enumerate(zip(boxes, scores, strict=True)):
        found = values.nonzero().squeeze(1)
        keep[image, found[torchvision.ops.nms(rows[found], values[found], iou_threshold)[:count]]] = True
    return keep


def _nms_shape(boxes: Tensor, scores: Tensor, iou_threshold: float, count: int) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


_LIBRARY.impl('nms', _nms, 'CompositeExplicitAutograd')
_register_fake = getattr(torch.library, 'register_fake', None) or torch.library.impl_abstract  # before PyTorch 2.4
_register_fake('mmevm::nms')(_nms_shape)


def translation_table() -> dict[Any, Any]:
    """Return the argument ``custom_translation_table`` of ``torch.onnx.export``."""
    from onnxscript import opset18

    op: Any = opset18  # its annotations are for scripts, not for tracing

    def to_onnx(boxes: Any, scores: Any, iou_threshold: float, count: int) -> Any:
        most = op.Constant(value_ints=[count])
        threshold = op.Constant(value_floats=[float(iou_threshold)])
        above = op.Constant(value_floats=[0.0])
        # Rows of image, class (one) and box.
        kept = op.NonMaxSuppression(boxes, op.Unsqueeze(scores, op.Constant(value_ints=[1])), most, threshold, above)
        index = op.Gather(kept, op.Constant(value_ints=[0, 2]), axis=1)
        ones = op.Expand(op.Constant(value_floats=[1.0]), op.Shape(kept, start=0, end=1))
        none = op.Mul(scores, op.Constant(value_float=0.0))
        return op.Greater(op.ScatterND(none, index, ones), op.Constant(value_float=0.5))

    return {torch.ops.mmevm.nms.default: to_onnx}
