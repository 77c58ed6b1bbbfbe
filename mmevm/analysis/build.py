"""Build the model of a config without weights, and find the size of its test images."""

from collections.abc import Sequence
from math import ceil
from typing import Any

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmevm.errors import ConfigError
from mmevm.models.weight_init import pretrained_cfgs

# Arguments with which modules load weights in their constructor. An init_cfg is only applied by init_weights().
_WEIGHT_ARGUMENTS = ('pretrained', 'checkpoint_path', 'teacher_ckpt')

# Keys of the pipeline steps that set the image size.
_SIZE_KEYS = dict(CenterCrop='crop_size', EfficientNetCenterCrop='crop_size', Resize='scale', Pad='size')


def build_without_weights(cfg: Config) -> nn.Module:
    """Build the model of a config with random weights, without reading or downloading any file.

    Raises:
        ConfigError: If the config has no model.
    """
    if 'model' not in cfg:
        raise ConfigError(f'{cfg.filename} has no `model`, so there is nothing to build. Pass a complete config.')
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    return revert_sync_batchnorm(MODELS.build(_remove_weights(cfg.model)))


def default_input_size(cfg: Config) -> tuple[tuple[int, int], str]:
    """Return height and width in pixels of a config's test images, and where they come from, for messages."""
    crop = (cfg.get('model', {}).get('data_preprocessor') or {}).get('size')
    if cfg.get('default_scope') == 'mmseg' and crop:  # the pipeline resizes to any aspect ratio
        return (crop[0], crop[1]), 'the crops of the training'
    sizes = [size for size in map(_output_size, _test_pipeline(cfg)) if size]
    if sizes:
        return sizes[-1]
    if cfg.get('default_scope') == 'mmdet':
        return (800, 1280), "MMDetection's usual size; the config's test pipeline sets none"
    return (224, 224), "the usual size; the config's test pipeline sets none"


def padded_size(model: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """Return height and width in pixels after the padding of a detector's data preprocessor."""
    divisor = getattr(getattr(model, 'data_preprocessor', None), 'pad_size_divisor', 1)
    height, width = (ceil(length / divisor) * divisor for length in size)
    return height, width


def _remove_weights(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _remove_weights(item) for key, item in value.items() if key not in _WEIGHT_ARGUMENTS}
        if pretrained_cfgs(kept.get('init_cfg')):
            kept['init_cfg'] = None
        return type(value)(kept)
    return type(value)(map(_remove_weights, value)) if isinstance(value, (list, tuple)) else value


def _test_pipeline(cfg: Config) -> Sequence[dict]:
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while 'dataset' in dataset:  # inside wrappers
        dataset = dataset['dataset']
    return dataset.get('pipeline') or cfg.get('test_pipeline') or ()


def _output_size(step: dict) -> tuple[tuple[int, int], str] | None:
    """Return (H, W) of a pipeline step's output, and its source; None if it depends on the input."""
    name = getattr(step['type'], '__name__', step['type']).rsplit('.', 1)[-1]
    size = step.get(_SIZE_KEYS[name]) if name in _SIZE_KEYS else None
    if size is None:
        return None
    width, height = (size, size) if isinstance(size, int) else size
    if step.get('keep_ratio'):
        if sorted((width, height)) == [800, 1333]:
            return (800, 1280), "MMDetection's usual size for images resized to fit (1333, 800)"
        width, height = max(width, height), min(width, height)
    return (height, width), f"{name} in the config's test pipeline"
