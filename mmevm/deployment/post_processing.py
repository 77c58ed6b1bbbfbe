"""From what the head of a one-stage detector puts out to boxes, in a form that can be exported.

MMDetection keeps what exceeds a threshold, so that the sizes of its tensors depend on the image, and goes through the
images one by one. Here each image has rows of a fixed number, and what falls short of the threshold gets the score 0.
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
    """What MMDetection makes of the outputs of a one-stage detector's head, for images that are not padded.

    Args:
        head: A ``bbox_head`` with the post-processing that most have in common (RetinaNet's, FCOS', ATSS', RTMDet's,
            …), whose ``test_cfg`` has plain non-maximum suppression and says how many objects an image may have.

    Raises:
        ConfigError: If the head has a post-processing of its own, another suppression, or no such number.
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
        """Find objects.

        Args:
            outputs: What the head puts out: for each level of the pyramid scores of classes, boxes, and the factors of
                the scores if the head has such, (B, …, H', W').
            size: Height and width of the images in pixels.

        Returns:
            ``dets`` (B, K, 5), of which a row is x1, y1, x2, y2 in pixels and the score, best first, and ``labels``
            (B, K). K is the ``max_per_img`` of the head's ``test_cfg``. Rows without an object have the score 0 and
            the label −1.
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
        scores = torch.where(self._survive(boxes, scores, labels), scores, 0)
        # Rows without an object, so that there are K where an image has fewer candidates.
        boxes = F.pad(boxes, (0, 0, 0, self.max_per_img))
        scores, labels = (F.pad(x, (0, self.max_per_img)) for x in (scores, labels))
        scores, best = scores.topk(self.max_per_img)
        boxes = boxes.gather(1, best.unsqueeze(-1).expand(-1, -1, 4))
        labels = torch.where(scores > 0, labels.gather(1, best), -1)
        return torch.cat([boxes, scores.unsqueeze(-1)], -1), labels

    def _candidates(
        self, cls_score: Tensor, bbox_pred: Tensor, *score_factor: Tensor, priors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (B, M, 4), scores (B, M) and labels (B, M) of the best M of a level; scores may be 0."""
        logits = _rows(cls_score, self.cls_out_channels)
        scores = logits.sigmoid() if self.use_sigmoid_cls else logits.softmax(-1)[..., :-1]
        classes = scores.shape[-1]
        scores = torch.where(scores > self.score_thr, scores, 0).flatten(1)
        count = torch.sym_min(self.nms_pre, scores.shape[1]) if self.nms_pre > 0 else scores.shape[1]
        scores, index = scores.topk(count)
        row = index // classes  # of a prior
        bbox_pred = _rows(bbox_pred, self.bbox_coder.encode_size)
        bbox_pred = bbox_pred.gather(1, row.unsqueeze(-1).expand(-1, -1, bbox_pred.shape[-1]))
        boxes = self.bbox_coder.decode(priors[row].flatten(0, 1), bbox_pred.flatten(0, 1)).unflatten(0, row.shape)
        for factor in score_factor:
            scores = scores * _rows(factor, 1).squeeze(-1).sigmoid().gather(1, row)
        return boxes, scores, index % classes

    def _survive(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        """Whether no better box of the same image and class overlaps it, (B, M)."""
        # Shifted apart, boxes of other classes (to the right) and of other images (below) do not overlap.
        side = boxes.max() - boxes.min() + 1
        image = torch.arange(len(boxes), device=boxes.device).unsqueeze(1).expand_as(labels)
        column = torch.zeros_like(labels) if self.class_agnostic else labels
        shift = torch.stack([column, image, column, image], -1) * side
        kept = nms((boxes + shift).flatten(0, 1), scores.flatten(), self.iou_threshold)
        return torch.zeros_like(scores.flatten()).index_fill(0, kept, 1).view_as(scores) > 0


def differences(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """How far detections are from others, whatever their order.

    Rounding decides which of two goes first whose scores are the same, and which one stays if they overlap by just the
    threshold: so one row in twenty may have no counterpart.

    Args:
        outputs: ``dets`` and ``labels``.
        expected: The same of the others.

    Returns:
        Twice, as of each output, the largest distance of a row from its counterpart on the other side, without the
        largest of each twenty: of scores relative to the largest score, of coordinates relative to the largest.
    """
    (dets, labels), (others, other_labels) = outputs, expected
    scale = others.double().abs().flatten(0, 1).amax(0)
    scale = torch.cat([scale[:4].amax().expand(4), scale[4:]]).clamp(min=torch.finfo(torch.float32).tiny)
    distances = []
    for one, kinds, other, other_kinds in zip(dets, labels, others, other_labels, strict=True):
        apart = ((one.unsqueeze(1) - other.double()) / scale).abs().amax(-1).nan_to_num(nan=torch.inf)
        apart = apart.masked_fill(kinds.unsqueeze(1) != other_kinds, torch.inf)[kinds >= 0][:, other_kinds >= 0]
        # Where one side has nothing, all of the other has no counterpart.
        apart = F.pad(apart, (0, 1, 0, 1), value=torch.inf)
        distances += [apart[:-1].amin(1), apart[:, :-1].amin(0)]
    found = torch.cat(distances)
    difference = found.quantile(0.95, interpolation='higher').item() if len(found) else 0.0
    return [difference, difference]


def _check(head: Any) -> None:
    kind = type(head).__name__
    steps = 'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process'
    own = [step for step in steps if getattr(type(head), step, None) is not getattr(BaseDenseHead, step)]
    if own or getattr(head.loss_cls, 'custom_cls_channels', False):
        raise ConfigError(
            f'--part detections: a {kind} has a post-processing of its own, which is not exported: take model.'
        )
    cfg = head.test_cfg or {}
    suppression = cfg.get('nms') or {}
    if suppression.get('type', 'nms') != 'nms' or 'iou_threshold' not in suppression:
        raise ConfigError(
            f'--part detections: model.test_cfg.nms={dict(suppression)} is not exported, only '
            "dict(type='nms', iou_threshold=…) is."
        )
    if (cfg.get('max_per_img') or 0) < 1:
        raise ConfigError(
            f'--part detections: model.test_cfg.max_per_img={cfg.get("max_per_img")} is not how many rows each image '
            'gets: set it to 1 or more, such as 100.'
        )


def _rows(x: Tensor, channels: int) -> Tensor:
    """(B, A·channels, H, W) to (B, H·W·A, channels)."""
    return x.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, channels))
