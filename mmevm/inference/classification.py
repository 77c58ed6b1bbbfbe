"""Classes of images: MMPretrain's inferencer with safe, strict loading and the class names of the checkpoint."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from mmpretrain import ImageClassificationInferencer, get_model
from mmpretrain.visualization import UniversalVisualizer

from mmevm.checkpoints import load_strict

from .inputs import read_image
from .model import dataset_meta, switch_to_deploy
from .predictor import Prediction


class ClassificationInferencer(ImageClassificationInferencer):
    """``ImageClassificationInferencer`` that loads checkpoints safely and strictly.

    Args and errors as for :class:`DetectionInferencer`.
    """

    def __init__(self, cfg: Config, checkpoint: str, device: str | None = None, deploy_mode: bool = False) -> None:
        init_default_scope('mmpretrain')
        model = revert_sync_batchnorm(get_model(cfg))
        classes = dataset_meta(load_strict(model, checkpoint), cfg, model, checkpoint)['classes']
        model._dataset_meta = dict(classes=classes)
        super().__init__(model.to(device or get_device()), classes=classes)
        if deploy_mode:
            switch_to_deploy(self.model)
        self.visualizer = UniversalVisualizer()

    read = staticmethod(read_image)

    def infer(self, images: list[np.ndarray], draw: bool = True, score_thr: float = 0.3) -> list[Prediction]:
        """Classify one batch.

        Args:
            images: What :meth:`read` returns, or frames of a video.
            draw: Whether to write the class and its score into the pictures.
            score_thr: Not used: the best class is drawn whatever its score.
        """
        (data,) = self.preprocess(images, batch_size=len(images))
        samples = self.forward(data)
        results = self.postprocess(samples, None)
        return [
            (
                result | dict(pred_scores=result['pred_scores'].tolist()),
                draw_class(self.visualizer, image, sample, self.classes) if draw else None,
            )
            for image, sample, result in zip(images, samples, results, strict=True)
        ]


def draw_class(
    visualizer: UniversalVisualizer, image: np.ndarray, sample: Any, classes: Sequence[str] | None
) -> np.ndarray:
    """Write the best class and its score into a copy of an image, (H, W, 3) in BGR."""
    # The text is not legible in smaller pictures.
    resize = 224 if min(image.shape[:2]) < 224 else None
    picture = visualizer.visualize_cls(image[..., ::-1], sample, classes=classes, draw_gt=False, resize=resize)
    return np.ascontiguousarray(picture[..., ::-1])
