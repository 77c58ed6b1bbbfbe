"""MMDetection's own ``predict`` as a function of images alone, and how far exported detections are from it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from .masks import paste_masks, resize_masks

CORRESPONDING = 1e-2  # largest distance of two objects whose masks are compared


class Predictions(nn.Module):
    """Call ``predict`` of a detector, and give each image the same number of rows.

    Args:
        model: A detector of MMDetection, in eval mode.
        count: Number of rows.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        self.model: Any = model
        self.count = count
        self.training = model.training

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Map images (B, C, H, W) to ``dets`` (B, K, 5), ``labels`` (B, K) and, if there are, boolean ``masks``.

        The masks have the size of the images: (B, K, H, W). Rows without an object have score 0 and label −1.
        """
        size = tuple(image.shape[2:])
        shapes = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), size)
        samples = [DetDataSample(metainfo=dict(shapes, scale_factor=(1.0, 1.0))) for _ in image]
        found = [sample.pred_instances for sample in self.model.predict(image, samples, rescale=True)]
        dets = [torch.cat([x.bboxes, x.scores.unsqueeze(1)], 1) for x in found]
        results = [self._stack(dets), self._stack([x.labels for x in found], -1)]
        if 'masks' in found[0]:
            results.append(self._stack([x.masks for x in found]))
        return tuple(results)

    def _stack(self, rows: Sequence[Tensor], value: int = 0) -> Tensor:
        fill = (0, 0) * (rows[0].ndim - 1)
        return torch.stack([F.pad(x, (*fill, 0, self.count - len(x)), value=value) for x in rows])


class CompareDetections:
    """The argument ``compare`` of ``export_onnx`` for detections.

    Args:
        mask_threshold: Of the masks of the file; None if it has none.
        mask_stride: Stride of masks of the whole image; None for masks within the box of each object.
    """

    def __init__(self, mask_threshold: float | None = None, mask_stride: int | None = None) -> None:
        self.mask_threshold, self.mask_stride = mask_threshold, mask_stride

    def __call__(self, outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
        """Return how far each output is from the expected one.

        Args:
            outputs: ``dets``, ``labels`` and, with a ``mask_threshold``, ``masks``.
            expected: What :class:`Predictions` returns.

        Returns:
            The results of :func:`compare_detections` and, with masks, of :func:`compare_masks`.
        """
        differences = compare_detections(outputs[:2], expected[:2])
        if self.mask_threshold is not None:
            size = (expected[2].shape[2], expected[2].shape[3])
            pasted = [self._to_image(masks, dets, size) for dets, masks in zip(outputs[0], outputs[2], strict=True)]
            differences.append(compare_masks((*outputs[:2], torch.stack(pasted)), expected))
        return differences

    def _to_image(self, masks: Tensor, dets: Tensor, size: tuple[int, int]) -> Tensor:
        threshold = self.mask_threshold or 0.0
        if self.mask_stride is None:
            return torch.from_numpy(paste_masks(masks.numpy(), dets[:, :4].numpy(), size, threshold))
        return torch.from_numpy(resize_masks(masks.numpy(), self.mask_stride, (1, 1), size, threshold))


def compare_masks(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return how far masks are from expected ones.

    Args:
        outputs: ``dets``, ``labels`` and boolean ``masks`` (B, K, H, W).
        expected: The same of the reference.

    Returns:
        The share of pixels that differ among those of all objects, over all pairs of objects that correspond.
    """
    different, total = 0, 0
    for dets, labels, masks, others, other_labels, other_masks in zip(*outputs, *expected, strict=True):
        nearest, index = _distances(dets, labels, others, other_labels, _scale(expected[0]))[:-1].min(1)
        rows = (nearest < CORRESPONDING).nonzero().squeeze(1)
        one, other = masks[labels >= 0][rows], other_masks[other_labels >= 0][index[rows]]
        different += int((one ^ other).sum())
        total += int((one | other).sum())
    return different / max(total, 1)


def compare_detections(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Return how far detections are from expected ones, in any order.

    Rounding decides the order of equal scores, and which box remains when the overlap is close to the threshold. So one
    row in twenty may have no counterpart.

    Args:
        outputs: ``dets`` and ``labels``.
        expected: The same of the reference.

    Returns:
        Twice, once for each output, the 95 % quantile of the distances of each row from its counterpart on the other
        side. A distance is the largest difference of scores relative to the largest score, and of coordinates relative
        to the largest coordinate.
    """
    scale = _scale(expected[0])
    distances = []
    for dets, labels, others, other_labels in zip(*outputs, *expected, strict=True):
        apart = _distances(dets, labels, others, other_labels, scale)
        distances += [apart[:-1].amin(1), apart[:, :-1].amin(0)]
    found = torch.cat(distances)
    difference = found.quantile(0.95, interpolation='higher').item() if len(found) else 0.0
    return [difference, difference]


def _scale(dets: Tensor) -> Tensor:
    """Return the largest coordinate (four times) and the largest score."""
    scale = dets.double().abs().flatten(0, 1).amax(0)
    return torch.cat([scale[:4].amax().expand(4), scale[4:]]).clamp(min=torch.finfo(torch.float32).tiny)


def _distances(dets: Tensor, labels: Tensor, others: Tensor, other_labels: Tensor, scale: Tensor) -> Tensor:
    """Return the distances of the N objects of an image from the M others, and a row and a column of infinity."""
    apart = ((dets.unsqueeze(1) - others.double()) / scale).abs().amax(-1).nan_to_num(nan=torch.inf)
    apart = apart.masked_fill(labels.unsqueeze(1) != other_labels, torch.inf)[labels >= 0][:, other_labels >= 0]
    # If one side is empty, no row of the other has a counterpart.
    return F.pad(apart, (0, 1, 0, 1), value=torch.inf)
