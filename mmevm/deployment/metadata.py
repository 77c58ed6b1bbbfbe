"""Metadata of exported files: what a program needs to prepare images and to read the outputs.

Each entry of ``metadata_props`` is a string. Lists, dicts and numbers are JSON.
"""

import json
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config

from mmevm.errors import ConfigError

# Steps of test pipelines that leave the image as it is.
_IGNORED = ('LoadImageFromFile', 'LoadAnnotations', 'PackDetInputs', 'PackInputs', 'PackSegInputs')
_DEFAULTS: dict[str, dict[str, Any]] = {
    'Resize': dict(scale=None, keep_ratio=False, interpolation='bilinear', backend='cv2'),
    'ResizeToMultiple': dict(size_divisor=32, interpolation=None),
    'ResizeEdge': dict(scale=None, edge='short', interpolation='bilinear', backend='cv2'),
    'CenterCrop': dict(crop_size=None),
    'Pad': dict(size=None, size_divisor=None, pad_to_square=False, pad_val=0),
}


def describe_preprocessing(cfg: Config) -> dict[str, str]:
    """Return how a config prepares images, as metadata of a file that takes its outputs.

    Returns:
        ``image_mean`` and ``image_std``, for pixels from 0 to 255 in the order of ``channel_order`` (RGB or BGR);
        ``pad_size_divisor``, of which height and width are made multiples, and ``pad_value``, the value of the padding
        after normalization; ``pad_size``, the least height and width, if a segmentor has one. And ``pipeline``, the
        steps before normalization with all arguments, as they are called in MMDetection, MMPretrain and
        MMSegmentation, unless the config has steps besides Resize, ResizeToMultiple, ResizeEdge, CenterCrop and Pad.
    """
    settings = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    channels = cfg.model.get('backbone', {}).get('in_channels', 3)
    mean, std = settings.get('mean') or [0.0] * channels, settings.get('std') or [1.0] * channels
    segmentation = settings.get('test_cfg') or {}  # how MMSegmentation pads
    rgb = settings.get('bgr_to_rgb') or settings.get('to_rgb')  # images are read as BGR
    result = {
        'image_mean': json.dumps(list(mean)),
        'image_std': json.dumps(list(std)),
        'channel_order': 'RGB' if rgb else 'BGR',
        'pad_size_divisor': str(settings.get('pad_size_divisor') or segmentation.get('size_divisor') or 1),
        'pad_value': str(settings.get('pad_value') or settings.get('pad_val') or 0),
    }
    if segmentation.get('size'):
        result['pad_size'] = json.dumps(list(segmentation['size']))
    dataset = (cfg.get('test_dataloader') or {}).get('dataset', {})
    while 'dataset' in dataset:  # inside wrappers
        dataset = dataset['dataset']
    steps = _describe_pipeline(dataset.get('pipeline'))
    return result if steps is None else result | {'pipeline': json.dumps(steps)}


def _describe_pipeline(pipeline: Any) -> list[dict[str, Any]] | None:
    if not isinstance(pipeline, (list, tuple)):
        return None
    steps = []
    for step in pipeline:
        kind = str(step.get('type')).rpartition('.')[2]
        if kind in _IGNORED:
            continue
        defaults, arguments = _DEFAULTS.get(kind), {key: value for key, value in step.items() if key != 'type'}
        if defaults is None or not arguments.keys() <= defaults.keys():
            return None
        values = defaults | arguments
        if isinstance(values.get('pad_val'), Mapping):
            values['pad_val'] = values['pad_val'].get('img', 0)
        for key in ('scale', 'crop_size'):
            if kind != 'ResizeEdge' and isinstance(values.get(key), int):
                values[key] = (values[key], values[key])
        if values.get('scale', 0) is None:  # scale_factor, which depends on the image, is no key of _DEFAULTS
            return None
        steps.append(dict(type=kind, **values))
    return steps


def read_metadata(entries: Mapping[str, str], file: str) -> dict[str, Any]:
    """Parse the metadata of a file with detections or classes.

    Args:
        entries: What an engine returns as the metadata of the file.
        file: Its name, for messages.

    Raises:
        ConfigError: If the file was not exported by mmevm, or holds another part of a model.
    """
    if 'mmevm_version' not in entries:
        raise ConfigError(
            f'{file}: there is no metadata of mmevm in this file. Export it with tools/export_onnx.py, which writes '
            'class names and preprocessing into the file.'
        )
    if 'task' not in entries:
        raise ConfigError(
            f'{file}: part={entries.get("part")!r}, expected an output that can be drawn. Export it with --part '
            'detections for a detector, or --part model for a classifier or segmentor.'
        )
    return parse_metadata(entries, file)


def parse_metadata(entries: Mapping[str, str], file: str) -> dict[str, Any]:
    """Parse the metadata of a file that holds any part of a model.

    Raises:
        ConfigError: If the metadata is damaged.
    """
    texts = ('channel_order', 'config', 'mmevm_version', 'part', 'precision', 'strides', 'task', 'weights')
    try:
        return {key: value if key in texts else json.loads(value) for key, value in entries.items()}
    except ValueError as error:
        raise ConfigError(f'{file}: its metadata is damaged ({error}). Export it again.') from error


def check_pipeline(metadata: Mapping[str, Any], file: str) -> None:
    """Raise a :class:`ConfigError` if the metadata of a file does not describe how images are prepared."""
    if 'pipeline' not in metadata:
        raise ConfigError(
            f'{file}: pipeline is missing in its metadata, because test_dataloader.dataset.pipeline of the config has '
            f'steps besides {", ".join(_DEFAULTS)}. Export it with --cfg-options for a pipeline of these, or run the '
            'config and its checkpoint.'
        )
