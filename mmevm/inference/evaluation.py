"""Exported files as models of MMEngine's runner, which evaluates them with the dataset and the metrics of a config."""

import copy
from logging import WARNING
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData
from torch import Tensor

from mmevm.errors import ConfigError
from mmevm.registry import MODELS

from .onnx import OnnxModel, find_class_map, find_objects, softmax

# By task: the scope of the config, and the model that runs the file.
_MODELS = {
    'detection': ('mmdet', 'OnnxDetector'),
    'instance segmentation': ('mmdet', 'OnnxDetector'),
    'classification': ('mmpretrain', 'OnnxClassifier'),
    'semantic segmentation': ('mmseg', 'OnnxSegmentor'),
}


class _OnnxRunnerModel(BaseModel):
    """Base class.

    Args:
        file: An exported file.
        engine: 'onnxruntime' or 'openvino'.
        dtype: What :class:`OnnxSession` takes.
        data_preprocessor: That of the config's model, which normalizes and pads the images.
    """

    def __init__(
        self, file: str, engine: str = 'onnxruntime', dtype: str = 'float32', data_preprocessor: dict | None = None
    ) -> None:
        super().__init__(data_preprocessor)
        self.onnx = OnnxModel(file, 'cpu', engine, dtype)

    def forward(self, inputs: Tensor, data_samples: list[Any], mode: str = 'predict') -> list[Any]:
        """Return the data samples of a batch (B, C, H, W) with predictions."""
        for output, sample in zip(self.onnx(list(inputs.numpy(force=True))), data_samples, strict=True):
            self._add_prediction(sample, output)
        return data_samples

    def _add_prediction(self, sample: Any, output: dict) -> None:
        raise NotImplementedError


@MODELS.register_module()
class OnnxDetector(_OnnxRunnerModel):
    """A file exported with ``--part detections``, as a detector of MMDetection."""

    def _add_prediction(self, sample: Any, output: dict) -> None:
        objects = find_objects(output, sample.scale_factor, sample.ori_shape, self.onnx.metadata)
        sample.pred_instances = InstanceData(**{key: torch.from_numpy(value) for key, value in objects.items()})


@MODELS.register_module()
class OnnxClassifier(_OnnxRunnerModel):
    """A file exported with ``--part model``, as a classifier of MMPretrain."""

    def _add_prediction(self, sample: Any, output: dict) -> None:
        scores = torch.from_numpy(softmax(output['logits']))
        sample.set_pred_score(scores).set_pred_label(scores.argmax(0, keepdim=True))


@MODELS.register_module()
class OnnxSegmentor(_OnnxRunnerModel):
    """A file exported with ``--part model`` or ``--part class_map``, as a segmentor of MMSegmentation."""

    def _add_prediction(self, sample: Any, output: dict) -> None:
        class_map = find_class_map(output, sample.img_shape, sample.ori_shape, self.onnx.metadata)
        sample.pred_sem_seg = PixelData(data=torch.from_numpy(class_map.astype(np.int64))[None])


WINDOWS = (
    "model.test_cfg.mode='slide' in the config: an exported file processes whole images, so its results differ from "
    'those of the checkpoint. To compare them, add --cfg-options model.test_cfg.mode=whole.'
)


def uses_windows(cfg: Config) -> bool:
    """Return whether a config processes windows of images one by one, as some segmentors of MMSegmentation do."""
    return (cfg.model.get('test_cfg') or {}).get('mode') == 'slide'


def use_onnx_file(cfg: Config, file: str, engine: str = 'onnxruntime', dtype: str = 'float32') -> None:
    """Replace the model of a config by an exported file, in place.

    Args:
        cfg: The config that the file was exported with.
        file: A file with detections, the logits of a classifier, or the logits or the class map of a segmentor.
        engine: 'onnxruntime' or 'openvino'.
        dtype: What :class:`OnnxSession` takes.

    Raises:
        ConfigError: If the file is for another task than the config, or has no metadata of mmevm.
        EngineError: If the engine is not installed, or cannot use the file.
    """
    task = OnnxModel(file, 'cpu', engine, dtype).metadata['task']
    scope, kind = _MODELS[task]
    if uses_windows(cfg):
        print_log(f'{file}: {WINDOWS}', 'current', WARNING)
    if cfg.get('default_scope') != scope:
        raise ConfigError(
            f'{file} is a model for {task}, but default_scope={cfg.get("default_scope")!r} in {cfg.filename}. Give the '
            'config that the file was exported with.'
        )
    preprocessor = dict(cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {})
    if scope == 'mmpretrain':
        preprocessor.setdefault('type', 'ClsDataPreprocessor')  # as in MMPretrain's classifiers
    cfg.model = dict(
        type=f'mmevm.{kind}', file=str(file), engine=engine, dtype=dtype, data_preprocessor=preprocessor or None
    )
    imports = cfg.get('custom_imports') or dict(imports=[])
    cfg.custom_imports = dict(imports, imports=[*imports['imports'], 'mmevm.inference.evaluation'])
    cfg.load_from, cfg.resume = None, False


def evaluate(cfg: Config, file: str) -> dict[str, float]:
    """Return the metrics of an exported file in ONNX Runtime, with the ``test_dataloader`` and evaluator of a config.

    Errors as for :func:`use_onnx_file`.
    """
    cfg = copy.deepcopy(cfg)
    use_onnx_file(cfg, file)
    cfg.log_level = 'WARNING'
    if cfg.get('visualizer'):
        cfg.visualizer.vis_backends = None
    with TemporaryDirectory(prefix='mmevm-evaluate-', ignore_cleanup_errors=True) as folder:
        cfg.work_dir = folder
        return Runner.from_cfg(cfg).test()
