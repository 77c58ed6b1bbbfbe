"""The parts of a classifier or detector that can be exported: backbone, neck, whole model or detections."""

import inspect
import json
from collections import Counter
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from mmevm.errors import ConfigError
from mmevm.tensors import DETECTORS, flatten_tensors, is_segmentor

from .segmentation import binary_threshold, compare_class_maps, replace_upsampling, segment

if find_spec('mmdet') is not None:  # classification alone does not need MMDetection
    from mmdet.models.detectors import SingleStageDetector, TwoStageDetector

    ONE_STAGE: tuple[type, ...] = (SingleStageDetector,)
    TWO_STAGE: tuple[type, ...] = (TwoStageDetector,)
else:
    ONE_STAGE = TWO_STAGE = ()

if find_spec('mmpretrain') is not None:
    from mmpretrain.models.heads import ClsHead

    CLASS_HEADS: tuple[type, ...] = (ClsHead,)  # one class for each image: the softmax of the logits
else:
    CLASS_HEADS = ()

PARTS = ('backbone', 'neck', 'model', 'detections', 'class_map')
EXAMPLE_SIZE = (256, 384)  # a multiple of every usual stride, so that the size of a map gives its stride


class ModelPart(nn.Module):
    """A classifier, a detector or a part of it, as a function of images alone.

    Args:
        model: A model of mmevm, MMDetection or MMPretrain.
        part: 'backbone'; 'neck', the pyramid of a detector; 'model', the logits of a classifier or the raw outputs of
            the heads of a one-stage detector; 'detections', the boxes and masks of a detector after post-processing;
            or 'class_map', the class of each pixel of a segmentor, whose 'model' is the logits at the size of the
            image. None is 'neck' for a detector that has one, else 'backbone'; and 'model' for a classifier or
            segmentor.

    Attributes:
        part: The part, never None.
        compare: The argument ``compare`` of ``export_onnx`` for this part.
        mask_threshold: With masks, the lowest value of a pixel that belongs to an object; else None.
        mask_stride: Stride of masks of the whole image; None for masks within the box of each object.

    Raises:
        ConfigError: If the model does not have this part, or the part depends on more than the images.
    """

    def __init__(self, model: nn.Module, part: str | None = None) -> None:
        super().__init__()
        detector, kind = isinstance(model, DETECTORS), type(model).__name__
        has = {name: getattr(model, name, None) is not None for name in ('backbone', 'neck')}
        self.part = part or ('model' if not detector else 'neck' if has['neck'] else 'backbone')
        if self.part not in PARTS:
            raise ConfigError(f'--part {part}: choose from {", ".join(PARTS)}.')
        segmentor = is_segmentor(model)
        if self.part == 'class_map' and not segmentor:
            raise ConfigError(f'--part class_map is for segmentors: choose another part for a {kind}.')
        if self.part in ('neck', 'detections') and not (detector or (segmentor and self.part == 'neck')):
            raise ConfigError(f'--part {self.part} is for detectors: choose backbone or model for a {kind}.')
        if not has.get(self.part, True):
            raise ConfigError(f'--part {self.part}: the {kind} of this config has no {self.part}.')
        if self.part == 'model' and detector and not isinstance(model, ONE_STAGE):
            raise ConfigError(
                f'--part model is for one-stage detectors, not for a {kind}, whose heads depend on the proposals found '
                'in an image: choose detections or neck.'
            )
        self.model: Any = model  # MMDetection and MMPretrain have no type annotations
        self.has_rois = isinstance(model, TWO_STAGE)
        self.post_processing: Any = None
        self.compare: Any = None
        self.mask_threshold: float | None = None
        self.mask_stride: int | None = None
        if self.part == 'detections':
            self._add_post_processing()
        self.training = model.training
        if is_segmentor(model):
            replace_upsampling(model)
        if self.part == 'class_map':
            self.compare = compare_class_maps

    def _add_post_processing(self) -> None:
        from .post_processing import InstancePostProcessing, PostProcessing
        from .predictions import CompareDetections
        from .roi_post_processing import RoIPostProcessing

        model = self.model
        is_one_stage = isinstance(model, ONE_STAGE)
        if self.has_rois:
            self.post_processing = RoIPostProcessing(model)
            if self.post_processing.with_masks:
                self.mask_threshold = float(model.roi_head.test_cfg.mask_thr_binary)
        elif not is_one_stage:
            raise ConfigError(
                f'--part detections is for one-stage and two-stage detectors, not for a {type(model).__name__}: choose '
                'neck.'
            )
        elif issubclass(type(model.bbox_head), InstancePostProcessing.owner):
            self.post_processing = InstancePostProcessing(model.bbox_head)
            self.mask_stride = model.bbox_head.prior_generator.strides[0][0]
            # The file contains logits.
            self.mask_threshold = torch.tensor(model.bbox_head.test_cfg.mask_thr_binary).logit().item()
        else:
            self.post_processing = PostProcessing(model.bbox_head)
        self.post_processing.train(model.training)
        self.zeros_are_padding = _zeros_are_padding(model)
        self.compare = CompareDetections(self.mask_threshold, self.mask_stride)

    def forward(self, image: Tensor) -> Any:
        """Map images (B, C, H, W) to the outputs of the part."""
        if self.post_processing is not None:
            outputs = self.model.extract_feat(image) if self.has_rois else self.model(image)
            return self.post_processing(outputs, image_sizes(image, self.zeros_are_padding))
        if self.part == 'backbone':
            return self.model.backbone(image)
        if self.part in ('model', 'class_map') and is_segmentor(self.model):
            return segment(self.model, image, class_map=self.part == 'class_map')
        return self.model.extract_feat(image) if self.part == 'neck' else self.model(image)

    def reference(self) -> nn.Module:
        """Return what a file must agree with: this part or, for detections, the detector's own ``predict``."""
        if self.post_processing is None:
            return self
        from .predictions import Predictions

        return Predictions(self.model, self.post_processing.max_per_img)

    def describe_results(self) -> dict[str, str]:
        """Return what the outputs of an exported file mean, as its metadata; empty for maps and raw outputs of heads.

        Returns:
            ``task``: 'detection', 'instance segmentation', 'semantic segmentation' or 'classification'. In JSON, of
            detections also ``score_threshold``, ``mask_threshold`` and ``mask_stride``; of a segmentor ``num_classes``
            and, of its logits, ``align_corners``, for resizing them, and ``threshold`` of :func:`binary_threshold`.
        """
        if self.part in ('model', 'class_map') and is_segmentor(self.model):
            result = {'task': 'semantic segmentation', 'num_classes': str(self.model.num_classes)}
            if self.part == 'model':
                result['align_corners'] = json.dumps(self.model.align_corners)
                result['threshold'] = json.dumps(binary_threshold(self.model))
            return result
        if self.post_processing is None:
            is_classifier = self.part == 'model' and isinstance(getattr(self.model, 'head', None), CLASS_HEADS)
            return {'task': 'classification'} if is_classifier else {}
        task = 'detection' if self.mask_threshold is None else 'instance segmentation'
        result = {'task': task, 'score_threshold': f'{self.post_processing.score_thr.item():.6g}'}
        if self.mask_threshold is not None:
            result |= {'mask_threshold': str(self.mask_threshold), 'mask_stride': json.dumps(self.mask_stride)}
        return result

    def disable_score_threshold(self) -> dict[str, float]:
        """Keep detections of any score, as few pass the threshold in the noise on which a file is verified.

        Returns:
            The argument ``constants`` of ``export_onnx``, which restores the threshold in the file.
        """
        if self.post_processing is None:
            return {}
        constants = {'post_processing.score_thr': self.post_processing.score_thr.item()}
        self.set_score_threshold(2.0**-100)  # not 0, which the exporter would merge with other zeros of the file
        return constants

    @torch.no_grad()
    def lower_contrast(self, noise: Tensor) -> Tensor:
        """Scale noise (B, C, H, W) such that few scores of the detections in it are equal.

        Noise of full contrast is far from real images: many scores can be 1 up to rounding, which then decides about
        the boxes that remain, and a correct file would be refused.
        """
        if self.post_processing is None:
            return noise
        ties = {}
        for contrast in (1.0, 0.3, 0.1, 0.03):
            dets, labels, *_ = self(noise * contrast)
            scores, exists = dets[..., 4], labels[:, 1:] >= 0  # the best first
            equal = scores[:, :-1] - scores[:, 1:] < 1e-5 * scores.max()
            ties[contrast] = int((equal & exists).sum()) / max(int(exists.sum()), 1)
            if ties[contrast] < 0.05:
                break
        return noise * min(ties, key=lambda contrast: ties[contrast])

    def set_score_threshold(self, value: float) -> None:
        """Set the lowest score of objects, also of :meth:`reference`."""
        self.post_processing.score_thr.fill_(value)
        head = self.model.roi_head if self.has_rois else self.model.bbox_head
        head.test_cfg.score_thr = self.post_processing.score_thr.item()

    def output_names(self, channels: int = 3) -> list[str]:
        """Return the names of the outputs: the kind of an output and the stride of a map, as in ``cls_scores_stride8``.

        Args:
            channels: Channels of an image.
        """
        if self.part == 'detections':
            return ['dets', 'labels'] + ['masks'] * (self.mask_threshold is not None)
        if self.part == 'class_map':
            return ['class_map']
        if self.part == 'model' and not isinstance(self.model, DETECTORS):
            return ['logits']
        parameter = next(self.parameters())
        with torch.no_grad():
            outputs = self(parameter.new_zeros(1, channels, *EXAMPLE_SIZE))
        groups = [('', outputs)]
        if self.part == 'model':  # the arguments of predict_by_feat are the outputs of an MMDetection head
            kinds = inspect.signature(self.model.bbox_head.predict_by_feat).parameters
            groups = list(zip((f'{kind}_' for kind in kinds), outputs, strict=False))
        names = [kind + _describe(x) for kind, group in groups for x in flatten_tensors(group)]
        counts = Counter(names)
        return [f'{name}_{names[:i].count(name)}' if counts[name] > 1 else name for i, name in enumerate(names)]


def image_sizes(image: Tensor, zeros_are_padding: bool) -> Tensor:
    """Return height and width of each image of a batch (B, C, H, W): (B, 2).

    Args:
        image: Images, padded at the bottom and on the right.
        zeros_are_padding: Whether rows and columns of zeros at the bottom and on the right are padding.
    """
    batch, _, height, width = image.shape
    if not zeros_are_padding:
        sides = [torch.scalar_tensor(side, dtype=image.dtype, device=image.device) for side in (height, width)]
        return torch.stack(sides).expand(batch, 2)
    # The first column and the first row are not padding, so they show where it begins.
    numbers = [torch.arange(1, side + 1, dtype=image.dtype, device=image.device) for side in (height, width)]
    edges = image[..., 0], image[..., 0, :]
    return torch.stack([((x != 0).any(1) * n).amax(1) for x, n in zip(edges, numbers, strict=True)], 1)


def _zeros_are_padding(model: Any) -> bool:
    """Return whether no normalized pixel is zero in all channels, as only padding is then."""
    preprocessor = getattr(model, 'data_preprocessor', None)
    mean = getattr(preprocessor, 'mean', None)
    # Pixels are integers, so that pixel − mean is 0 in all channels only if all of mean are integers.
    return mean is not None and bool((mean % 1).any()) and getattr(preprocessor, 'pad_value', 0) == 0


def _describe(x: Tensor) -> str:
    if x.ndim != 4:
        return 'hidden_states' if x.ndim == 3 else 'output'
    return f'stride{EXAMPLE_SIZE[0] // x.shape[2]}'
