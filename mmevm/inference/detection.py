"""Objects in images: MMDetection's inferencer with safe, strict loading and class names in its results."""

import copy
import warnings
from typing import Any

import numpy as np
from mmdet.apis import DetInferencer
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from torch import nn

from mmevm.checkpoints import load_strict

from .model import class_counts, dataset_meta, is_palette, switch_to_deploy
from .predictor import Prediction


class DetectionInferencer(DetInferencer):
    """``DetInferencer`` for boxes and masks that loads checkpoints safely and strictly.

    Args:
        cfg: A config of MMDetection's scope.
        checkpoint: What ``fetch_checkpoint`` takes: a local file, a URL and more.
        device: Where the model runs; None is a GPU if there is one.
        deploy_mode: Whether to fuse the layers of the model first: the same results, faster.

    Raises:
        CheckpointError: If the checkpoint cannot be read or is not one of this model.
        ConfigError: If the model has no deploy mode.
    """

    def __init__(self, cfg: Config, checkpoint: str, device: str | None = None, deploy_mode: bool = False) -> None:
        cfg = copy.deepcopy(cfg)
        cfg.setdefault('visualizer', dict(type='DetLocalVisualizer'))
        cfg.visualizer.vis_backends = None  # they are for the pictures of a training
        self.checkpoint = checkpoint
        super().__init__(cfg, device=device, show_progress=False)
        if deploy_mode:
            switch_to_deploy(self.model)

    def _load_weights_to_model(self, model: nn.Module, checkpoint: dict | None, cfg: Any) -> None:
        meta = dataset_meta(load_strict(model, self.checkpoint), cfg, model, self.checkpoint)
        needed = len(meta['classes'] or ()) or max(class_counts(model), default=0)
        palette = meta.get('palette')
        model.dataset_meta = meta | dict(  # type: ignore[assignment]
            palette=palette if is_palette(palette, needed) else 'random'
        )

    def _init_collate(self, cfg: Any) -> Any:
        # mmengine warns about the scope before it finds that there is no collate_fn.
        return super()._init_collate(cfg) if 'collate_fn' in cfg.test_dataloader else pseudo_collate

    def visualize(self, inputs: Any, preds: Any, **kwargs: Any) -> Any:
        """Draw as for paths: DetInferencer takes arrays for RGB here, but for BGR in its pipeline."""
        inputs = [image[..., ::-1] if isinstance(image, np.ndarray) else image for image in inputs]
        return super().visualize(inputs, preds, **kwargs)

    def pred2dict(self, data_sample: Any, pred_out_dir: str = '') -> dict:
        """Add the name of each label, as ``class_names``."""
        result = super().pred2dict(data_sample, pred_out_dir)
        if 'labels' in result:
            names = self.model.dataset_meta['classes']
            result['class_names'] = [names[label] if names else f'class {label}' for label in result['labels']]
        return result

    def read(self, source: str) -> np.ndarray:
        """Read an image as the config's test pipeline does, from a path or URL: (H, W, 3) in BGR, as a rule."""
        (loader,) = (step for step in self.pipeline.transforms if type(step).__name__ == 'InferencerLoader')
        return loader.from_file(dict(img_path=source))['img']

    def infer(self, images: list[np.ndarray], draw: bool = True, score_thr: float = 0.3) -> list[Prediction]:
        """Detect objects in one batch.

        Args:
            images: What :meth:`read` returns, or frames of a video.
            draw: Whether to draw the objects.
            score_thr: Objects of lower scores are not drawn; the results hold all.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', '.* is out of bounds', UserWarning)  # objects at the border
            results = self(images, batch_size=len(images), return_vis=draw, pred_score_thr=score_thr)
        pictures = [np.ascontiguousarray(picture[..., ::-1]) for picture in results['visualization']]
        return list(zip(results['predictions'], pictures if draw else [None] * len(images), strict=True))
