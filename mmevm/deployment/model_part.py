"""The parts of a classifier or detector that can be exported: backbone, neck, whole model or detections."""

import inspect
import json
from collections import Counter
from importlib.util import find_spec
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmevm.errors import ConfigError
from mmevm.tensors import DETECTORS, flatten_tensors, is_segmentor

from .segmentation import compare_class_maps, segment

if find_spec('mmdet') is not None:  # classification alone does not need MMDetection
    from mmdet.models.detectors import SingleStageDetector

    ONE_STAGE: tuple[type, ...] = (SingleStageDetector,)
else:
    ONE_STAGE = ()

PARTS = ('backbone', 'neck', 'model', 'detections', 'class_map')
EXAMPLE_SIZE = (256, 384)  # a multiple of every usual stride, so that the size of a map gives its stride


class ModelPart(nn.Module):
    """A classifier, a detector or a part of it, as a function of images alone.

    Args:
        model: A model of mmevm, MMDetection or MMPretrain.
        part: 'backbone'; 'neck', the pyramid of a detector; 'model', the logits of a classifier or the raw outputs of
            the heads of a one-stage detector; or 'detections', the boxes of a one-stage detector after post-processing.
            None is 'neck' for a detector that has one, else 'backbone'; and 'model' for a classifier or segmentor. Of a
            segmentor, 'model' is the logits at the size of the image, and 'class_map' the class of each pixel.

    Attributes:
        part: The part, never None.
        compare: The argument ``compare`` of ``export_onnx`` for this part.

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
        if self.part in ('model', 'detections') and detector and not isinstance(model, ONE_STAGE):
            raise ConfigError(
                f'--part {self.part} is for one-stage detectors, not for a {kind}, whose heads depend on the proposals '
                'found in an image: choose neck.'
            )
        self.post_processing, self.compare = None, None
        if self.part == 'detections':
            from .post_processing import PostProcessing, compare_detections  # needs MMDetection

            self.post_processing = PostProcessing(model.bbox_head).train(model.training)
            self.compare = compare_detections
        self.model: Any = model  # MMDetection and MMPretrain have no type annotations
        self.training = model.training
        if self.part == 'class_map':
            self.compare = compare_class_maps

    def forward(self, image: Tensor) -> Any:
        """Map images (B, C, H, W) to the outputs of the part."""
        if self.post_processing is not None:
            return self.post_processing(self.model(image), image.shape[2:])
        if self.part == 'backbone':
            return self.model.backbone(image)
        if self.part in ('model', 'class_map') and is_segmentor(self.model):
            return segment(self.model, image, class_map=self.part == 'class_map')
        return self.model.extract_feat(image) if self.part == 'neck' else self.model(image)

    def disable_score_threshold(self) -> dict[str, float]:
        """Keep detections of any score, as few pass the threshold in the noise on which a file is verified.

        Returns:
            The argument ``constants`` of ``export_onnx``, which restores the threshold in the file.
        """
        if self.post_processing is None:
            return {}
        threshold = self.post_processing.score_thr
        constants = {'post_processing.score_thr': threshold.item()}
        threshold.fill_(2.0**-100)  # not 0, which the exporter would merge with other zeros of the file
        return constants

    def output_names(self, channels: int = 3) -> list[str]:
        """Return the names of the outputs: the kind of an output and the stride of a map, as in ``cls_scores_stride8``.

        Args:
            channels: Channels of an image.
        """
        if self.part == 'detections':
            return ['dets', 'labels']
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


def preprocessing(cfg: Config) -> dict[str, str]:
    """Return what a config's data preprocessor does to images, as metadata of a file that takes its outputs.

    Returns:
        ``image_mean`` and ``image_std``, for pixels from 0 to 255 in the order of ``channel_order`` (RGB or BGR), and
        ``pad_size_divisor``, of which height and width are made multiples.
    """
    settings = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    channels = cfg.model.get('backbone', {}).get('in_channels', 3)
    mean, std = settings.get('mean') or [0.0] * channels, settings.get('std') or [1.0] * channels
    rgb = settings.get('bgr_to_rgb') or settings.get('to_rgb')  # images are read as BGR
    return {
        'image_mean': json.dumps(list(mean)),
        'image_std': json.dumps(list(std)),
        'channel_order': 'RGB' if rgb else 'BGR',
        'pad_size_divisor': str(settings.get('pad_size_divisor') or 1),
    }


def _describe(x: Tensor) -> str:
    if x.ndim != 4:
        return 'hidden_states' if x.ndim == 3 else 'output'
    return f'stride{EXAMPLE_SIZE[0] // x.shape[2]}'
