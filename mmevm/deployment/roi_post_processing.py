"""Proposals, boxes and masks of two-stage detectors as functions of the maps of the pyramid that can be exported."""

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.ops import RoIAlign
from mmdet.models.roi_heads import CascadeRoIHead, SingleRoIExtractor, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from torch import Tensor, nn
from torchvision.ops import roi_align

from mmevm.errors import ConfigError

from .nms import nms
from .post_processing import (
    ProposalPostProcessing,
    check_test_cfg,
    clip,
    overrides,
    select_best,
    unsupported,
)


class RoIPostProcessing(nn.Module):
    """Convert the pyramid of Faster, Mask or Cascade (Mask) R-CNN to boxes and masks as MMDetection does.

    Each image gets the same number of proposals and of objects: proposals that do not exist have no area, and their
    objects the score 0. The mask head runs on all rows, also on those without an object.

    Args:
        model: A ``TwoStageDetector`` with an ``RPNHead`` and a ``StandardRoIHead`` or ``CascadeRoIHead``.

    Attributes:
        with_masks: Whether the detector has a mask head.

    Raises:
        ConfigError: If a head has its own post-processing, or a setting cannot be exported.
    """

    score_thr: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        roi_head = model.roi_head
        _check(model)
        self.proposals = ProposalPostProcessing(model.rpn_head)
        cfg = roi_head.test_cfg
        self.iou_threshold = cfg.nms.iou_threshold
        self.class_agnostic = cfg.nms.get('class_agnostic', False)
        self.max_per_img = cfg.max_per_img
        self.with_masks = bool(roi_head.with_mask)
        self.register_buffer('score_thr', torch.tensor(float(cfg.score_thr)), persistent=False)
        # In tuples, because the modules belong to the model.
        self._rpn_head = (model.rpn_head,)
        self._box_stages = list(zip(*map(_listed, (roi_head.bbox_roi_extractor, roi_head.bbox_head)), strict=True))
        self._mask_stages: list[tuple[Any, Any]] = []
        if self.with_masks:
            extractors = roi_head.mask_roi_extractor  # None if it is shared with the boxes
            self._mask_stages = list(zip(*map(_listed, (extractors, roi_head.mask_head)), strict=True))

    def forward(self, maps: Sequence[Tensor], sizes: Tensor) -> tuple[Tensor, ...]:
        """Return boxes, scores, labels and, if the detector has masks, masks.

        Args:
            maps: Levels of the pyramid, (B, C, H', W') each.
            sizes: Height and width of each image in pixels, without padding, (B, 2).

        Returns:
            ``dets`` (B, K, 5), ``labels`` (B, K) as :class:`PostProcessing`, and ``masks`` (B, K, S, S): probabilities
            within the box of each object, for its class.
        """
        (rpn_head,) = self._rpn_head
        proposals, levels = self.proposals(rpn_head(maps), sizes)
        dets, labels = self._boxes(maps, proposals[..., :4], levels >= 0, sizes)
        if not self.with_masks:
            return dets, labels
        return dets, labels, self._masks(maps, dets[..., :4], labels)

    def _boxes(self, maps: Sequence[Tensor], boxes: Tensor, exists: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        batch, count = boxes.shape[:2]
        logits = []
        for i, (extractor, head) in enumerate(self._box_stages):
            outputs = head(_extract(extractor, maps, boxes))
            scores, deltas = (output.unflatten(0, (batch, count)) for output in outputs)
            logits.append(scores)
            if i + 1 < len(self._box_stages):
                classes = None if head.reg_class_agnostic else scores[..., :-1].argmax(-1, keepdim=True)
                boxes = _decode(head, boxes, deltas, sizes, classes).squeeze(2)
        scores = (torch.stack(logits).mean(0) if len(logits) > 1 else logits[0]).softmax(-1)[..., :-1]
        scores = torch.where((scores > self.score_thr) & exists.unsqueeze(-1), scores, 0)  # (B, R, classes)
        boxes = _decode(head, boxes, deltas, sizes).expand(-1, -1, scores.shape[-1], -1)
        rows = boxes.flatten(1, 2)
        if self.class_agnostic:
            keep = nms(rows, scores.flatten(1), self.iou_threshold, self.max_per_img)
        else:  # one suppression for each image and class
            per_class = boxes.transpose(1, 2).flatten(0, 1), scores.transpose(1, 2).flatten(0, 1)
            keep = nms(*per_class, self.iou_threshold, self.max_per_img)
            keep = keep.unflatten(0, (batch, -1)).transpose(1, 2).flatten(1)
        scores = torch.where(keep, scores.flatten(1), 0)
        index = torch.arange(rows.shape[1], device=rows.device).expand_as(scores)
        dets, labels, _ = select_best(rows, scores, index % boxes.shape[2], index, self.max_per_img)
        return dets, labels

    def _masks(self, maps: Sequence[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        masks = []
        for extractor, head in self._mask_stages:
            found = head(_extract(extractor, maps, boxes)).unflatten(0, labels.shape)  # (B, K, classes, S, S)
            index = (labels.clamp(min=0) * (not head.class_agnostic)).reshape(*labels.shape, 1, 1, 1)
            masks.append(found.gather(2, index.expand(-1, -1, -1, *found.shape[3:])).squeeze(2).sigmoid())
        return torch.stack(masks).mean(0) if len(masks) > 1 else masks[0]


def _extract(extractor: Any, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """Return the features (B·R, C, S, S) of boxes (B, R, 4), each from the level of its size."""
    maps = maps[: extractor.num_inputs]
    image = torch.arange(boxes.shape[0], device=boxes.device).to(boxes).reshape(-1, 1, 1)
    rois = torch.cat([image.expand(-1, boxes.shape[1], -1), boxes], -1).flatten(0, 1)
    levels = extractor.map_roi_levels(rois, len(maps)).reshape(-1, 1)
    features: Any = 0.0
    for i, (layer, x) in enumerate(zip(extractor.roi_layers, maps, strict=True)):
        # Boxes of other levels have no area here: sampling them costs nothing.
        here = levels == i
        part = roi_align(
            x,
            torch.cat([rois[:, :1], torch.where(here, rois[:, 1:], 0)], 1),
            layer.output_size,
            layer.spatial_scale,
            layer.sampling_ratio,
            layer.aligned,
        )
        features = torch.where(here.reshape(-1, 1, 1, 1), part, features)
    return features


def _decode(head: Any, boxes: Tensor, deltas: Tensor, sizes: Tensor, classes: Tensor | None = None) -> Tensor:
    """Return the boxes of each class, (B, R, C, 4), or those of the given classes (B, R, 1): (B, R, 1, 4).

    Args:
        head: A ``BBoxHead``.
        boxes: What it refines, (B, R, 4).
        deltas: Its second output, (B, R, 4·C), C is 1 if the boxes do not depend on the class.
        sizes: Height and width of each image, (B, 2).
        classes: Indices of classes.
    """
    deltas = deltas.unflatten(-1, (-1, 4))
    if classes is not None:
        deltas = deltas.gather(2, classes.unsqueeze(-1).expand(-1, -1, -1, 4))
    priors = boxes.unsqueeze(2).expand_as(deltas)
    decoded = head.bbox_coder.decode(priors.flatten(0, 2), deltas.flatten(0, 2))
    decoded = decoded.reshape(boxes.shape[0], -1, 4)
    if head.bbox_coder.clip_border:
        decoded = clip(decoded, sizes)
    return decoded.reshape(deltas.shape)


def _listed(modules: Any) -> list[Any]:
    return list(modules) if isinstance(modules, nn.ModuleList) else [modules]


def _check(model: Any) -> None:
    roi_head = model.roi_head
    owner = CascadeRoIHead if isinstance(roi_head, CascadeRoIHead) else StandardRoIHead
    steps = 'predict', 'predict_bbox', 'predict_mask', '_bbox_forward', '_mask_forward', '_refine_roi'
    if overrides(roi_head, owner, *steps) or roi_head.with_shared_head:
        raise unsupported(roi_head)
    check_test_cfg(roi_head.test_cfg, 'model.test_cfg.rcnn')
    for head in _listed(roi_head.bbox_head):
        custom = head.custom_cls_channels or head.custom_activation or not head.with_reg
        if (
            custom
            or head.bbox_coder.encode_size != 4
            or overrides(head, BBoxHead, 'predict_by_feat', '_predict_by_feat_single', 'regress_by_class')
        ):
            raise unsupported(head)
    extractors = _listed(roi_head.bbox_roi_extractor)
    if roi_head.with_mask:
        for head in _listed(roi_head.mask_head):
            if overrides(head, FCNMaskHead, 'predict_by_feat', '_predict_by_feat_single', 'forward'):
                raise unsupported(head)
        extractors += _listed(roi_head.mask_roi_extractor)
    for extractor in extractors:
        if overrides(extractor, SingleRoIExtractor, 'forward', 'map_roi_levels'):
            raise unsupported(extractor)
        for layer in extractor.roi_layers:
            if type(layer) is not RoIAlign or layer.pool_mode != 'avg' or layer.use_torchvision:
                raise ConfigError(
                    f'--part detections: {type(layer).__name__} of {type(extractor).__name__} cannot be exported: '
                    "expected roi_layer=dict(type='RoIAlign', …) with pool_mode='avg' and use_torchvision=False."
                )
