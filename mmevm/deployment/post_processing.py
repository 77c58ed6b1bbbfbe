"""Post-processing of one-stage detectors that can be exported: from the outputs of the head to boxes.

MMDetection processes the images one by one and keeps what exceeds a threshold, so that the sizes of its tensors depend
on the image. Here each image gets a fixed number of rows, and rows below the threshold get the score 0.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from torch import Tensor, nn
from torchvision.ops import nms

from mmevm.errors import ConfigError


class PostProcessing(nn.Module):
    """Convert the outputs of a one-stage detector's head to boxes as MMDetection does, for images without padding.

    Args:
        head: A ``bbox_head`` with the post-processing of ``BaseDenseHead`` (as RetinaNet, FCOS, ATSS and RTMDet), whose
            ``test_cfg`` has plain non-maximum suppression and ``max_per_img``.

    Raises:
        ConfigError: If the head has its own post-processing, another suppression, or no ``max_per_img``.
    """

    score_thr: Tensor

    def __init__(self, head: Any) -> None:
        super().__init__()
        _check(head)
        cfg = head.test_cfg
        self.prior_generator = head.prior_generator
        self.bbox_coder = head.bbox_coder
        self.cls_out_channels = head.cls_out_channels
        self.use_sigmoid_cls = head.use_sigmoid_cls
        self.nms_pre = cfg.get('nms_pre', -1)
        self.min_bbox_size = cfg.get('min_bbox_size', -1)
        self.iou_threshold = cfg.nms.iou_threshold
        self.class_agnostic = cfg.nms.get('class_agnostic', False)
        self.max_per_img = cfg.max_per_img
        self.register_buffer('score_thr', torch.tensor(float(cfg.get('score_thr', 0))), persistent=False)

    def forward(self, outputs: Sequence[Sequence[Tensor]], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return boxes, scores and labels.

        Args:
            outputs: Outputs of the head: for each level of the pyramid class scores, boxes and, if the head has them,
                factors of the scores, (B, …, H', W').
            size: Height and width of the images in pixels.

        Returns:
            ``dets`` (B, K, 5) with rows of x1, y1, x2, y2 in pixels and score, best first, and ``labels`` (B, K). K is
            ``max_per_img`` of the head's ``test_cfg``. Rows without an object have score 0 and label −1.
        """
        levels = list(zip(*outputs, strict=True))
        maps = levels[0][0]
        priors = self.prior_generator.grid_priors(
            [level[0].shape[2:] for level in levels], dtype=maps.dtype, device=maps.device
        )
        found = [self._candidates(*level, priors=prior) for level, prior in zip(levels, priors, strict=True)]
        boxes, scores, labels = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        if self.bbox_coder.clip_border:
            limits = torch.stack([torch.scalar_tensor(side, dtype=boxes.dtype) for side in (*size[::-1], *size[::-1])])
            boxes = boxes.clamp(min=0).minimum(limits.to(boxes.device))
        if self.min_bbox_size >= 0:
            sides = boxes[..., 2:] - boxes[..., :2]
            scores = torch.where((sides > self.min_bbox_size).all(-1), scores, 0)
        scores = torch.where(self._nms(boxes, scores, labels), scores, 0)
        # Add K rows without an object, for images with fewer candidates.
        boxes = F.pad(boxes, (0, 0, 0, self.max_per_img))
        scores, labels = (F.pad(x, (0, self.max_per_img)) for x in (scores, labels))
        scores, best = scores.topk(self.max_per_img)
        boxes = boxes.gather(1, best.unsqueeze(-1).expand(-1, -1, 4))
        labels = torch.where(scores > 0, labels.gather(1, best), -1)
        return torch.cat([boxes, scores.unsqueeze(-1)], -1), labels

    def _candidates(
        self, cls_score: Tensor, bbox_pred: Tensor, *score_factor: Tensor, priors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return boxes (B, M, 4), scores (B, M) and labels (B, M) of the best M of a level; scores may be 0."""
        logits = _rows(cls_score, self.cls_out_channels)
        scores = logits.sigmoid() if self.use_sigmoid_cls else logits.softmax(-1)[..., :-1]
        classes = scores.shape[-1]
        scores = torch.where(scores > self.score_thr, scores, 0).flatten(1)
        count = torch.sym_min(self.nms_pre, scores.shape[1]) if self.nms_pre > 0 else scores.shape[1]
        scores, index = scores.topk(count)
        row = index // classes  # index of the prior
        bbox_pred = _rows(bbox_pred, self.bbox_coder.encode_size)
        bbox_pred = bbox_pred.gather(1, row.unsqueeze(-1).expand(-1, -1, bbox_pred.shape[-1]))
        boxes = self.bbox_coder.decode(priors[row].flatten(0, 1), bbox_pred.flatten(0, 1)).unflatten(0, row.shape)
        for factor in score_factor:
            scores = scores * _rows(factor, 1).squeeze(-1).sigmoid().gather(1, row)
        return boxes, scores, index % classes

    def _nms(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        """Return whether no better box of the same image and class overlaps a box, (B, M)."""
        # One call for all: shift boxes of other classes to the right and of other images down, so that none overlap.
        side = boxes.max() - boxes.min() + 1
        image = torch.arange(len(boxes), device=boxes.device).unsqueeze(1).expand_as(labels)
        column = torch.zeros_like(labels) if self.class_agnostic else labels
        shift = torch.stack([column, image, column, image], -1) * side
        kept = nms((boxes + shift).flatten(0, 1), scores.flatten(), self.iou_threshold)
        return torch.zeros_like(scores.flatten()).index_fill(0, kept, 1).view_as(scores) > 0


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
    (dets, labels), (others, other_labels) = outputs, expected
    scale = others.double().abs().flatten(0, 1).amax(0)
    scale = torch.cat([scale[:4].amax().expand(4), scale[4:]]).clamp(min=torch.finfo(torch.float32).tiny)
    distances = []
    for one, kinds, other, other_kinds in zip(dets, labels, others, other_labels, strict=True):
        apart = ((one.unsqueeze(1) - other.double()) / scale).abs().amax(-1).nan_to_num(nan=torch.inf)
        apart = apart.masked_fill(kinds.unsqueeze(1) != other_kinds, torch.inf)[kinds >= 0][:, other_kinds >= 0]
        # A column and a row of inf: if one side is empty, no row of the other has a counterpart.
        apart = F.pad(apart, (0, 1, 0, 1), value=torch.inf)
        distances += [apart[:-1].amin(1), apart[:, :-1].amin(0)]
    found = torch.cat(distances)
    difference = found.quantile(0.95, interpolation='higher').item() if len(found) else 0.0
    return [difference, difference]


def _check(head: Any) -> None:
    kind = type(head).__name__
    steps = 'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process'
    overridden = [step for step in steps if getattr(type(head), step, None) is not getattr(BaseDenseHead, step)]
    if overridden or getattr(head.loss_cls, 'custom_cls_channels', False):
        raise ConfigError(
            f'--part detections: {kind} has its own post-processing, which cannot be exported: choose --part model.'
        )
    cfg = head.test_cfg or {}
    suppression = cfg.get('nms') or {}
    if suppression.get('type', 'nms') != 'nms' or 'iou_threshold' not in suppression:
        raise ConfigError(
            f'--part detections: model.test_cfg.nms={dict(suppression)} cannot be exported: expected '
            "dict(type='nms', iou_threshold=…)."
        )
    if (cfg.get('max_per_img') or 0) < 1:
        raise ConfigError(
            f'--part detections: model.test_cfg.max_per_img={cfg.get("max_per_img")}: expected the number of rows of '
            'each image, such as 100.'
        )


def _rows(x: Tensor, channels: int) -> Tensor:
    """(B, A·channels, H, W) to (B, H·W·A, channels)."""
    return x.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, channels))
