"""Post-processing of the heads of MMDetection that can be exported: from the outputs of a head to boxes and masks.

MMDetection processes the images one by one and keeps what exceeds a threshold, so that the sizes of its tensors depend
on the image. Here each image gets a fixed number of rows, and rows below the threshold get the score 0.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import RPNHead, RTMDetInsHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from torch import Tensor, nn

from mmevm.errors import ConfigError

from .nms import nms


class PostProcessing(nn.Module):
    """Convert the outputs of a dense head to boxes as MMDetection does.

    Args:
        head: A ``bbox_head`` with the post-processing of ``BaseDenseHead`` (as RetinaNet, FCOS, ATSS and RTMDet), whose
            ``test_cfg`` has plain non-maximum suppression and ``max_per_img``.

    Raises:
        ConfigError: If the head has its own post-processing, another suppression, or no ``max_per_img``.
    """

    score_thr: Tensor
    owner: Any = BaseDenseHead  # the class whose post-processing this is
    key = 'model.test_cfg'

    def __init__(self, head: Any) -> None:
        super().__init__()
        _check_head(head, self.owner)
        cfg = head.test_cfg
        check_test_cfg(cfg, self.key)
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

    def forward(self, outputs: Sequence[Any], sizes: Tensor) -> tuple[Tensor, ...]:
        """Return boxes, scores and labels.

        Args:
            outputs: Outputs of the head: for each level of the pyramid class scores, boxes and, if the head has them,
                factors of the scores, (B, …, H', W').
            sizes: Height and width of each image in pixels, without padding, (B, 2).

        Returns:
            ``dets`` (B, K, 5) with rows of x1, y1, x2, y2 in pixels and score, best first, and ``labels`` (B, K). K is
            ``max_per_img`` of the head's ``test_cfg``. Rows without an object have score 0 and label −1.
        """
        dets, labels, _ = self.detect(outputs, sizes)
        return dets, labels

    def detect(self, outputs: Sequence[Sequence[Tensor]], sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``dets``, ``labels`` and the index of each row's prior among the priors of all levels, (B, K)."""
        levels = list(zip(*outputs, strict=True))
        priors = self._priors(levels)
        found = [
            self._candidates(*level, priors=prior, level=i)
            for i, (level, prior) in enumerate(zip(levels, priors, strict=True))
        ]
        starts: list[Any] = [0]  # index of the first prior of each level
        for prior in priors[:-1]:
            starts.append(starts[-1] + prior.shape[0])
        rows = torch.cat([row + start for (*_, row), start in zip(found, starts, strict=True)], 1)
        boxes, scores, labels, _ = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        if self.bbox_coder.clip_border:
            boxes = clip(boxes, sizes)
        if self.min_bbox_size >= 0:
            sides = boxes[..., 2:] - boxes[..., :2]
            scores = torch.where((sides > self.min_bbox_size).all(-1), scores, 0)
        # Move the boxes of other classes away, so that they do not overlap.
        column = torch.zeros_like(labels) if self.class_agnostic else labels
        shift = column.unsqueeze(-1) * (boxes.max() - boxes.min() + 1)
        keep = nms(boxes + shift, scores, self.iou_threshold, self.max_per_img)
        scores = torch.where(keep, scores, 0)
        return select_best(boxes, scores, labels, rows, count=self.max_per_img)

    def _priors(self, levels: Sequence[Sequence[Tensor]], **options: Any) -> list[Tensor]:
        maps = levels[0][0]
        return self.prior_generator.grid_priors(
            [level[0].shape[2:] for level in levels], dtype=maps.dtype, device=maps.device, **options
        )

    def _candidates(
        self, cls_score: Tensor, bbox_pred: Tensor, *score_factor: Tensor, priors: Tensor, level: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return boxes (B, M, 4), scores, labels and indices of the priors (B, M) of the best M; scores may be 0."""
        logits = _rows(cls_score, self.cls_out_channels)
        scores = logits.sigmoid() if self.use_sigmoid_cls else logits.softmax(-1)[..., :-1]
        classes = scores.shape[-1]
        scores = torch.where(scores > self.score_thr, scores, 0).flatten(1)
        count = torch.sym_min(self.nms_pre, scores.shape[1]) if self.nms_pre > 0 else scores.shape[1]
        scores, index = scores.topk(count, sorted=False)  # the suppression sorts
        row = index // classes  # index of the prior
        bbox_pred = _rows(bbox_pred, self.bbox_coder.encode_size)
        boxes = self.bbox_coder.decode(priors[row].flatten(0, 1), gather_rows(bbox_pred, row).flatten(0, 1))
        for factor in score_factor:
            scores = scores * _rows(factor, 1).squeeze(-1).sigmoid().gather(1, row)
        return boxes.unflatten(0, row.shape), scores, self._labels(index % classes, level), row

    def _labels(self, labels: Tensor, level: int) -> Tensor:
        return labels


class ProposalPostProcessing(PostProcessing):
    """The same for an ``RPNHead``: its proposals suppress only others of the same level, which is their label here."""

    owner = RPNHead
    key = 'model.test_cfg.rpn'

    def _labels(self, labels: Tensor, level: int) -> Tensor:
        return torch.full_like(labels, level)


class InstancePostProcessing(PostProcessing):
    """The same for an RTMDet-Ins head, with masks.

    ``forward`` returns a third tensor: ``masks`` (B, K, H', W'), logits at the stride of the finest level for the whole
    image. Each object has its own three small convolutions, which run on features that the objects of an image share.
    """

    owner = RTMDetInsHead

    def __init__(self, head: Any) -> None:
        super().__init__(head)
        self.channels = head.dyconv_channels
        self.weight_sizes, self.bias_sizes = list(head.weight_nums), list(head.bias_nums)

    def forward(self, outputs: Sequence[Any], sizes: Tensor) -> tuple[Tensor, ...]:
        """Return ``dets``, ``labels`` and ``masks``."""
        scores, boxes, kernels, features = outputs
        dets, labels, index = self.detect((scores, boxes), sizes)
        rows = torch.cat([_rows(level, sum(self.weight_sizes + self.bias_sizes)) for level in kernels], 1)
        priors = torch.cat(self._priors([(level,) for level in scores], with_stride=True))[index]
        return dets, labels, self._masks(features, gather_rows(rows, index), priors)

    def _masks(self, features: Tensor, kernels: Tensor, priors: Tensor) -> Tensor:
        """Return logits (B, K, H', W').

        Args:
            features: (B, C, H', W').
            kernels: Weights and biases of the convolutions of each object, (B, K, P).
            priors: x, y and stride (twice) of the point where each object was found, (B, K, 4).
        """
        height, width = features.shape[2:]
        points = self.prior_generator.single_level_grid_priors(
            (height, width), 0, dtype=features.dtype, device=features.device
        )
        # Relative to the object, in units of eight strides: (B, K, 2, H'·W')
        offsets = (priors[..., :2].unsqueeze(2) - points) / (priors[..., 2:3].unsqueeze(2) * 8)
        shared = features.flatten(2).unsqueeze(1).expand(-1, priors.shape[1], -1, -1)
        x = torch.cat([offsets.transpose(2, 3), shared], 2)
        parts = kernels.split(self.weight_sizes + self.bias_sizes, -1)
        weights, biases = parts[: len(self.weight_sizes)], parts[len(self.weight_sizes) :]
        for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            x = weight.unflatten(-1, (bias.shape[-1], -1)) @ (x.relu() if i else x) + bias.unsqueeze(-1)
        return x.squeeze(2).unflatten(-1, (height, width))


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip boxes (B, M, 4) to images of these heights and widths (B, 2)."""
    return boxes.clamp(min=0).minimum(sizes.flip(-1).repeat(1, 2).unsqueeze(1).to(boxes))


def select_best(
    boxes: Tensor, scores: Tensor, labels: Tensor, rows: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``count`` rows of highest scores of each image, best first; rows of score 0 hold no object.

    Args:
        boxes: (B, M, 4).
        scores: (B, M).
        labels: (B, M).
        rows: Numbers that belong to the rows, (B, M).
        count: K; M may be smaller.

    Returns:
        ``dets`` (B, K, 5), ``labels`` (B, K), −1 without an object, and ``rows`` (B, K).
    """
    # Add rows without an object, for images with fewer candidates.
    boxes = F.pad(boxes, (0, 0, 0, count))
    scores, labels, rows = (F.pad(x, (0, count)) for x in (scores, labels, rows))
    scores, best = scores.topk(count)
    labels = torch.where(scores > 0, labels.gather(1, best), -1)
    return torch.cat([gather_rows(boxes, best), scores.unsqueeze(-1)], -1), labels, rows.gather(1, best)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return rows of x (B, M, C) by their indices (B, K): (B, K, C)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def check_test_cfg(cfg: Any, key: str) -> None:
    """Raise a :class:`ConfigError` if a ``test_cfg`` has no plain suppression or no ``max_per_img``."""
    cfg = cfg or {}
    suppression = cfg.get('nms') or {}
    if suppression.get('type', 'nms') != 'nms' or 'iou_threshold' not in suppression:
        raise ConfigError(
            f'--part detections: {key}.nms={dict(suppression)} cannot be exported: expected '
            "dict(type='nms', iou_threshold=…)."
        )
    if (cfg.get('max_per_img') or 0) < 1:
        raise ConfigError(
            f'--part detections: {key}.max_per_img={cfg.get("max_per_img")}: expected the number of rows of '
            'each image, such as 100.'
        )


def overrides(instance: Any, owner: type, *methods: str) -> bool:
    """Return whether an object does not use these methods of a class."""
    return any(getattr(type(instance), name, None) is not getattr(owner, name, None) for name in methods)


def unsupported(instance: Any) -> ConfigError:
    """Return the error for a head that computes its results in its own way."""
    return ConfigError(
        f'--part detections: {type(instance).__name__} has its own post-processing, which cannot be exported: choose '
        '--part neck, or --part model for a one-stage detector.'
    )


def _check_head(head: Any, owner: type) -> None:
    steps = 'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process'
    if overrides(head, owner, *steps) or getattr(head.loss_cls, 'custom_cls_channels', False):
        raise unsupported(head)


def _rows(x: Tensor, channels: int) -> Tensor:
    """(B, A·channels, H, W) to (B, H·W·A, channels)."""
    return x.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, channels))
