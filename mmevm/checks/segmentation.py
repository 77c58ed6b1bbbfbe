"""Check the label maps of a segmentation dataset before the first iteration."""

import os
from collections import Counter
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from PIL import Image, UnidentifiedImageError

from mmevm.errors import ConfigError

from .config import preview, skip_failures

_MAX_READ = 200  # label maps that are decoded, evenly spaced; of all, the header of the file is read
_STOCK = ('mmcv', 'mmdet', 'mmevm', 'mmseg')  # packages whose steps do not change labels
_ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_ORIENTATION = 274


def check_label_maps(key: str, dataset: BaseDataset, infos: list[dict], steps: list[Any]) -> tuple[Counter, list[str]]:
    """Check the label maps of a dataset of MMSegmentation.

    Args:
        key: Dotted key of the dataset in the config.
        dataset: The dataset.
        infos: Its entries.
        steps: The steps of its pipeline.

    Returns:
        The number of pixels of each label in up to 200 maps, and warnings.

    Raises:
        ConfigError: If a map is missing, has several channels or more than 8 bits; if a map does not fit its image, or
            one of the training data has a label that is not the index of a class. Sizes and labels are only warned
            about if the pipeline has steps of the user's own, which may change them.
    """
    loader = next((step for step in steps if type(step).__name__ == 'LoadAnnotations'), None)
    if loader is None:  # images without labels, or the user's own format
        return Counter(), []
    paths = {info['seg_map_path']: info for info in infos if '://' not in info['seg_map_path']}
    _check_files(key, paths)
    stock = all(type(step).__module__.split('.')[0] in _STOCK for step in steps)
    warnings: list[str] = []
    plain = getattr(loader, 'imdecode_backend', None) in ('pillow', 'cv2')  # others read other files than images
    for path, info in paths.items() if plain else ():
        with skip_failures():
            warnings += _check_header(key, path, info['img_path'], stock)
    return _check_labels(key, dataset, [*paths.values()], loader, stock, warnings)


def _check_files(key: str, paths: dict[str, dict]) -> None:
    missing = [path for path in paths if not os.path.isfile(path)]
    if not missing:
        return
    path = Path(missing[0])
    similar = next(path.parent.glob(f'{escape(path.name.split(".")[0])}*'), None)
    hint = f' (found {similar.name}; set seg_map_suffix)' if similar else ''
    raise ConfigError(
        f'{key}: {len(missing)} of {len(paths)} label maps are missing: '
        f'{preview(map(os.path.abspath, missing))}{hint}. Restore them, remove their images, or correct '
        f'{key}.data_prefix.seg_map_path and seg_map_suffix.'
    )


def _check_header(key: str, path: str, image_path: str, stock: bool) -> list[str]:
    """Check number of channels, bits and size, without decoding the file."""
    try:
        with Image.open(path) as labels:
            mode, size = labels.mode, labels.size
    except UnidentifiedImageError as error:
        raise ConfigError(f'{key}: the label map {os.path.abspath(path)} is not an image, or is damaged.') from error
    if mode not in ('L', 'P', '1'):
        several = 'several channels' if mode in ('RGB', 'RGBA', 'LA', 'CMYK') else 'more than 8 bits'
        raise ConfigError(
            f'{key}: the label map {os.path.abspath(path)} has {several} (mode {mode}), but label maps have one '
            'channel of 8 bits with the index of the class of each pixel. Convert them (see docs/segmentation.md).'
        )
    with Image.open(image_path) as image:
        image_size = image.size[::-1] if image.getexif().get(_ORIENTATION) in _ROTATED else image.size
    if size == image_size:
        return []
    text = (
        f'{key}: the label map {os.path.abspath(path)} has {size[0]}×{size[1]} pixels (width×height), but its image '
        f'has {image_size[0]}×{image_size[1]}. Resize one of them, labels without interpolation.'
    )
    same_shape = abs(size[0] * image_size[1] - size[1] * image_size[0]) < 0.01 * size[0] * image_size[1]
    if stock and not (same_shape and key.startswith('train')):
        raise ConfigError(text)
    return [text]  # the pipeline may resize both to the same size


def _check_labels(
    key: str, dataset: Any, infos: list[dict], loader: Any, stock: bool, warnings: list[str]
) -> tuple[Counter, list[str]]:
    """Decode some maps as the pipeline does and compare their labels with the classes."""
    classes = len(dataset.metainfo.get('classes') or ())
    ignored = {255, dataset.ignore_index}  # reduce_zero_label and the datasets of MMSegmentation set 255
    counts: Counter = Counter()
    outside: dict[str, list[int]] = {}
    sample = infos[:: max(1, len(infos) // _MAX_READ)][:_MAX_READ]
    for info in sample:
        try:
            labels = loader(dict(info, seg_fields=[]))['gt_seg_map']
        except AssertionError as error:  # reduce_zero_label of the dataset and of the step differ
            raise ConfigError(f'{key}: {" ".join(str(error).split())}.') from error
        values, pixels = np.unique(labels, return_counts=True)
        counts.update(dict(zip(values.tolist(), pixels.tolist(), strict=True)))
        if wrong := [int(value) for value in values if value not in {*range(classes), *ignored}]:
            outside[info['seg_map_path']] = wrong
    for value in ignored:
        counts.pop(value, None)
    if outside and classes:
        path, wrong = next(iter(outside.items()))
        text = (
            f'{key}: {len(outside)} of {len(sample)} label maps that were read have labels outside of the {classes} '
            f'classes (0 to {classes - 1}, and {dataset.ignore_index} to ignore a pixel): {os.path.abspath(path)} has '
            f'{preview(wrong)}. {_advice(key, dataset, classes, {*counts})}'
        )
        if stock and key.startswith('train'):
            raise ConfigError(text)
        warnings.append(text)
    elif dataset.metainfo.get('reduce_zero_label') and classes > 1 and max(counts, default=classes) == classes - 2:
        warnings.append(
            f'{key}: reduce_zero_label=True ignores label 0 of the files, and no pixel of {len(sample)} label maps has '
            f'label {classes}. If label 0 is a class, set reduce_zero_label=False.'
        )
    return counts, list(dict.fromkeys(warnings))


def _advice(key: str, dataset: Any, classes: int, labels: set[int]) -> str:
    reduce_zero_label = dataset.metainfo.get('reduce_zero_label')
    if not reduce_zero_label and max(labels) == classes:
        return f'If label 0 is no class and classes are numbered from 1, set {key}.reduce_zero_label=True.'
    return f'Correct the maps, or {key}.metainfo.classes.'
