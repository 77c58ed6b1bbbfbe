"""The class of each pixel: MMSegmentation's model and pipeline with safe, strict loading and class names."""

import copy
from collections.abc import Sequence
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from mmseg.visualization import SegLocalVisualizer

from mmevm.checkpoints import load_strict

from .model import class_counts, dataset_meta, switch_to_deploy
from .predictor import Prediction


class SegmentationInferencer:
    """Runs a segmentor. MMSegInferencer loads checkpoints unsafely and leniently, and does not take class names.

    Args and errors as for :class:`DetectionInferencer`.
    """

    def __init__(self, cfg: Config, checkpoint: str, device: str | None = None, deploy_mode: bool = False) -> None:
        init_default_scope('mmseg')
        model: Any = revert_sync_batchnorm(MODELS.build(cfg.model))
        meta = dataset_meta(load_strict(model, checkpoint), cfg, model, checkpoint)
        self.model = model.to(device or get_device()).eval()
        if deploy_mode:
            switch_to_deploy(self.model)
        classes = meta['classes'] or [f'class {label}' for label in range(max(class_counts(model)))]
        self.describer = ClassMapDescriber(classes, meta.get('palette'))
        self.pipeline, self.loader = _pipeline(cfg)

    def read(self, source: str) -> np.ndarray:
        """Read an image as the config's test pipeline does, from a path or URL: (H, W, 3) uint8 in BGR."""
        return self.loader(dict(img_path=source))['img']

    def infer(self, images: list[np.ndarray], draw: bool = True, score_thr: float = 0.3) -> list[Prediction]:
        """Segment one batch. Images of different sizes are processed one by one.

        Args:
            images: What :meth:`read` returns, or frames of a video.
            draw: Whether to draw the classes over the images.
            score_thr: Not used: each pixel gets its best class.

        Returns:
            For each image a dict with ``sem_seg``, the index of the class of each pixel (H, W), and ``labels``,
            ``class_names`` and ``pixels`` of the classes that occur, most frequent first; and its picture.
        """
        data = [self.pipeline(_as_loaded(image)) for image in images]
        same = len({tuple(item['inputs'].shape) for item in data}) == 1
        batches = [data] if same else [[item] for item in data]
        samples = [sample for batch in batches for sample in self.model.test_step(pseudo_collate(batch))]
        return [
            self.describer(image, sample.pred_sem_seg.data[0].cpu().numpy(), draw)
            for image, sample in zip(images, samples, strict=True)
        ]


class ClassMapDescriber:
    """Describes and draws the classes of the pixels of an image.

    Args:
        classes: Names of the classes.
        palette: RGB colors; random ones if it has fewer colors than there are classes.
    """

    def __init__(self, classes: Sequence[str], palette: Any = None) -> None:
        self.classes = classes
        self.visualizer = SegLocalVisualizer(alpha=0.5)  # whose constructor confuses classes and palette
        self.visualizer.dataset_meta = dict(classes=classes, palette=_palette(palette, len(classes)))

    def __call__(self, image: np.ndarray, class_map: np.ndarray, draw: bool) -> Prediction:
        """Return what :meth:`SegmentationInferencer.infer` returns for one image.

        Args:
            image: (H, W, 3) uint8 in BGR.
            class_map: Index of the class of each pixel, (H, W).
            draw: Whether to draw the classes over the image.
        """
        class_map = class_map.astype(np.int64)  # floating point if there is one logit for two classes
        labels, pixels = np.unique(class_map, return_counts=True)
        order = np.argsort(-pixels, kind='stable')
        labels = labels[order].tolist()
        result = dict(
            sem_seg=class_map.astype(np.uint8 if len(self.classes) <= 256 else np.uint16),
            labels=labels,
            class_names=[self.classes[label] for label in labels],
            pixels=pixels[order].tolist(),
        )
        return result, self._draw(image, class_map) if draw else None

    def _draw(self, image: np.ndarray, class_map: np.ndarray) -> np.ndarray:
        sample = SegDataSample(pred_sem_seg=PixelData(data=torch.from_numpy(class_map[None])))
        self.visualizer.add_datasample('', mmcv.bgr2rgb(image), sample, draw_gt=False)
        return np.ascontiguousarray(self.visualizer.get_image()[..., ::-1])


def _pipeline(cfg: Config) -> tuple[Compose, Any]:
    """Return the test pipeline after the loading of images and without labels, and the step that loads images."""
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:  # inside wrappers
        dataset = dataset.dataset
    first, *steps = copy.deepcopy(dataset.pipeline)
    loader = Compose([first])
    return Compose([step for step in steps if 'Annotation' not in str(step['type'])]), loader


def _as_loaded(image: np.ndarray) -> dict[str, Any]:
    """Return what the pipeline gets from the step that loads an image."""
    shape = image.shape[:2]
    return dict(img=image, img_path='', img_shape=shape, ori_shape=shape, reduce_zero_label=False, seg_fields=[])


def _palette(palette: Any, count: int) -> list:
    if isinstance(palette, (list, tuple)) and len(palette) >= count:
        return list(palette[:count])
    return np.random.default_rng(0).integers(0, 255, (count, 3)).tolist()
