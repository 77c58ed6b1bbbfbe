"""Summarize the datasets that a runner has built: images and objects per class, and what is skipped."""

import json
import os
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.dataset import BaseDataset

from mmevm.errors import ConfigError

from .config import preview, skip_failures
from .segmentation import check_label_maps


@dataclass
class DatasetSummary:
    """Number of images and objects of a dataset."""

    key: str  # dotted key in the config
    dataset: BaseDataset
    objects: Counter = field(default_factory=Counter)  # by label; for a classifier, images; for a segmentor, pixels
    ignored: int = 0  # objects with ignore_flag
    is_detection: bool = False
    unlabeled: bool = False  # has images without known labels, as for self-supervised training
    total_images: int | None = None  # in the annotation file
    skipped: Counter = field(default_factory=Counter)  # objects in the annotation file that are not used, by reason
    warnings: list[str] = field(default_factory=list)

    @cached_property  # metainfo copies all names each time
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        classes = self.dataset.metainfo.get('classes') or ()
        return () if isinstance(classes, str) else tuple(classes)

    @property
    def images(self) -> int:
        """Number of images in use."""
        return len(self.dataset)

    def __str__(self) -> str:
        text = f'{self.key} ({type(self.dataset).__name__}): {self.images} images'
        if skipped := (self.total_images or self.images) - self.images:
            filter_cfg = dict(getattr(self.dataset, 'filter_cfg', None) or {})
            text += f' of {self.total_images} ({skipped} skipped by filter_cfg={filter_cfg})'
        if self.is_detection:
            text += f'; {self.objects.total()} objects'
            text += f'; objects to ignore: {self.ignored}' if self.ignored else ''
        return text + (f'; skipped objects: {self._reasons()}' if self.skipped else '')

    def _reasons(self) -> str:
        return ', '.join(f'{number} {reason}' for reason, number in self.skipped.most_common())

    def per_class(self) -> str:
        """Return the number of objects per class, most frequent first."""
        counts = sorted(((self.objects[i], name) for i, name in enumerate(self.classes)), reverse=True)
        return preview((f'{name} {count}' for count, name in counts), 20)

    def describe_empty(self) -> str:
        """Return why there is nothing to train on."""
        if hasattr(self.dataset, 'img_suffix') and not self.dataset.ann_file:  # label maps beside a folder of images
            folder = os.path.abspath(self.dataset.data_prefix['img_path'])
            return (
                f'{self.key}: no file in {folder} ends in {self.dataset.img_suffix}. Correct data_prefix.img_path and '
                f'img_suffix of {self.key}.'
            )
        file = os.path.abspath(self.dataset.ann_file or self.dataset.data_root or '')
        reasons = f' (skipped objects: {self._reasons()})' if self.skipped else ''
        advice = f'Correct the annotations, or ann_file, data_prefix, metainfo.classes and filter_cfg of {self.key}.'
        advice = next(iter(self.warnings), advice)
        return f'{self.key}: none of the {self.total_images or 0} images of {file} has an object{reasons}. {advice}'


def leaf_datasets(dataset: Any, key: str) -> Iterator[tuple[str, BaseDataset]]:
    """Yield datasets, also those in wrappers such as ``RepeatDataset``, with their dotted keys."""
    if isinstance(getattr(dataset, 'datasets', None), (list, tuple)):
        for i, item in enumerate(dataset.datasets):
            yield from leaf_datasets(item, f'{key}.datasets.{i}')
    elif hasattr(dataset, 'dataset'):
        yield from leaf_datasets(dataset.dataset, f'{key}.dataset')
    elif isinstance(dataset, BaseDataset):
        yield key, dataset


def summarize_all(datasets: dict[str, Any]) -> list[DatasetSummary]:
    """Summarize the datasets of a run. Skip those of an unknown kind.

    Args:
        datasets: Built datasets or wrappers, by their dotted keys in the config. Keys of training data start with
            'train'.

    Returns:
        A summary of each dataset, including those in wrappers.

    Raises:
        ConfigError: If there are no objects to train on, or a dataset cannot be used (see :func:`summarize`).
    """
    summaries: list[DatasetSummary] = []
    for key, dataset in datasets.items():
        training = key.startswith('train')
        with skip_failures():
            of_key = [summarize(leaf_key, leaf, training) for leaf_key, leaf in leaf_datasets(dataset, key)]
            if training and of_key and not any(summary.objects or summary.unlabeled for summary in of_key):
                raise ConfigError(of_key[0].describe_empty())
            summaries += of_key
    return summaries


def summarize(key: str, dataset: BaseDataset, training: bool) -> DatasetSummary:
    """Count images and objects of a dataset and look for mistakes.

    Args:
        key: Dotted key of the dataset in the config.
        dataset: The dataset, fully initialized.
        training: Whether it is used for training.

    Raises:
        ConfigError: If an image file is missing or empty, if the pipeline loads masks and an object has none, or if a
            label map cannot be used (see :func:`check_label_maps`).
    """
    summary = DatasetSummary(key, dataset)
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    for info in infos:
        labels, instances = info.get('gt_label'), info.get('instances')
        if instances is not None:
            used = [instance for instance in instances if not instance.get('ignore_flag')]
            summary.is_detection = True
            summary.objects.update(instance['bbox_label'] for instance in used if 'bbox_label' in instance)
            summary.ignored += len(instances) - len(used)
        elif labels is not None:
            summary.objects.update(np.atleast_1d(labels).tolist())
        else:
            summary.unlabeled = True
    steps = list(getattr(getattr(dataset, 'pipeline', None), 'transforms', ()))
    with skip_failures():
        _check_image_files(key, dataset, infos, steps)
    with skip_failures():
        _check_boxes(summary, infos, steps, training)
    if training:
        _check_masks(key, infos, steps)
    if infos and {'seg_map_path', 'label_map'} <= infos[0].keys():  # a dataset of MMSegmentation
        with skip_failures():
            summary.objects, warnings = check_label_maps(key, dataset, infos, steps)
            summary.warnings += warnings
    with skip_failures():
        compare_with_file(summary)
    return summary


def compare_class_order(summaries: list[DatasetSummary]) -> Iterator[str]:
    """Warn if training and evaluation data give the same label to different classes."""
    train = [summary for summary in summaries if summary.key.startswith('train')]
    others = [summary for summary in summaries if not summary.key.startswith('train')]
    if len(train) != 1 or len(others) != 1 or type(train[0].dataset) is not type(others[0].dataset):
        return
    pairs = zip(train[0].classes, others[0].classes, strict=False)
    for first, second in [(first, second) for first, second in pairs if first != second][:1]:
        yield (
            f'{train[0].key} and {others[0].key} number their classes differently: one has {first!r} where the other '
            f'has {second!r}. Set the same metainfo.classes, or use the same class folders.'
        )


def _check_boxes(summary: DatasetSummary, infos: list[dict], steps: list[Any], training: bool) -> None:
    boxes = [
        (*instance['bbox'], info['width'], info['height'])
        for info in infos
        if 'width' in info and 'height' in info
        for instance in info.get('instances') or ()
        if not instance.get('ignore_flag') and len(instance.get('bbox', ())) == 4
    ]
    left, top, right, bottom, width, height = np.reshape(boxes, (-1, 6)).T
    outside = np.sum((right > 1.02 * width + 1) | (bottom > 1.02 * height + 1))
    flat = np.sum((right <= left) | (bottom <= top))
    filters = any(type(step).__name__ == 'FilterAnnotations' for step in steps)
    if outside > 0.2 * len(boxes):
        summary.warnings.append(
            f'{summary.key}: {outside} of {len(boxes)} boxes exceed their image. A COCO bbox is x, y, width, height; '
            'these look like x1, y1, x2, y2.'
        )
    if flat and training and not filters and getattr(summary.dataset, 'bbox_min_size', None) is None:
        summary.warnings.append(
            f'{summary.key}: {flat} of {len(boxes)} boxes have no area, which can make losses infinite. Correct them, '
            "or add dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1)) after LoadAnnotations."
        )


def _check_image_files(key: str, dataset: BaseDataset, infos: list[dict], steps: list[Any]) -> None:
    files = {info['img_path']: info for info in infos if isinstance(info.get('img_path'), str)}
    missing = [path for path in files if '://' not in path and not os.path.isfile(path)]
    unusable = missing or [path for path in files if '://' not in path and not os.path.getsize(path)]
    if not unusable or not steps:
        return
    try:
        # The loader decides: it may read another storage, or skip what it cannot read.
        steps[0](dict(files[unusable[0]]))
    except (OSError, AssertionError, cv2.error) as error:
        path = Path(unusable[0])
        similar = next(path.parent.glob(f'{escape(path.stem)}.*'), path)
        hint = f' (found {similar.name}, but {type(dataset).__name__} reads {path.name})' if similar != path else ''
        raise ConfigError(
            f'{key}: {len(unusable)} of {len(infos)} image files are {"missing" if missing else "empty"}: '
            f'{preview(map(os.path.abspath, unusable))}{hint}. Restore them, remove them from the annotations, or '
            f'correct {key}.data_prefix.'
        ) from error


def _check_masks(key: str, infos: list[dict], steps: list[Any]) -> None:
    # Exactly this transform: those for panoptic or empty annotations also have with_mask, but read no instance masks.
    if not any(type(step).__name__ == 'LoadAnnotations' and getattr(step, 'with_mask', False) for step in steps):
        return
    objects = [(str(info.get('img_path')), item) for info in infos for item in info.get('instances') or ()]
    without = [path for path, item in objects if 'mask' not in item]
    if without:
        raise ConfigError(
            f'{key}: {len(without)} of {len(objects)} objects have no segmentation, but the pipeline loads masks '
            f'(with_mask=True): {preview(dict.fromkeys(without))}. Add them, or use a detector without a mask head.'
        )


def compare_with_file(summary: DatasetSummary) -> None:
    """Add to a summary what its annotation files contain beyond the dataset, for COCO and Pascal VOC formats."""
    dataset: Any = summary.dataset
    file = getattr(dataset, 'ann_file', None)
    if summary.unlabeled or not isinstance(file, str) or not os.path.isfile(file) or dataset._indices is not None:
        return
    if hasattr(dataset, 'cat_ids') and file.endswith('.json'):
        total, reasons = _compare_with_coco(summary, json.loads(Path(file).read_bytes()))
    elif hasattr(dataset, 'ann_subdir'):
        total, reasons = _compare_with_voc(summary, dataset)
    else:
        return
    rest = total - summary.objects.total() - summary.ignored - reasons.total()
    reasons['without area, outside their image, marked "ignore" or in skipped images'] = rest
    summary.skipped = +reasons


def _compare_with_coco(summary: DatasetSummary, coco: dict) -> tuple[int, Counter]:
    """Return the number of annotations in the file, and of those that cannot belong to the dataset, by reason."""
    names = [category.get('name') for category in coco.get('categories') or []]
    _compare_names(summary, names)
    classes, in_file = set(summary.classes), set(names)
    ordered = [name for name in names if name in classes]
    if ordered != [name for name in summary.classes if name in in_file]:
        summary.warnings.append(
            f'{summary.key}.metainfo.classes has another order than the categories of the annotation file '
            f'({preview(ordered)}), by which MMDetection numbers them. Use its order.'
        )
    images = {image.get('id') for image in coco.get('images') or []}
    annotations = coco.get('annotations') or []
    listed = [ann for ann in annotations if ann.get('image_id') in images]
    cat_ids = set(summary.dataset.cat_ids)
    others = sum(ann.get('category_id') not in cat_ids for ann in listed)
    summary.total_images = len(images)
    unlisted = len(annotations) - len(listed)
    return len(annotations), Counter({'of images that are not listed': unlisted, 'of other classes': others})


def _compare_with_voc(summary: DatasetSummary, dataset: Any) -> tuple[int, Counter]:
    """Return the number of objects in the files, and of those that XMLDataset skips, by reason."""
    images = filter(None, map(str.strip, Path(dataset.ann_file).read_text().splitlines()))
    files = [Path(dataset.sub_data_root, dataset.ann_subdir, f'{image}.xml') for image in images]
    summary.total_images = len(files)
    objects = Counter(found.text for file in files for found in ET.parse(file).iterfind('object/name'))
    others = [name for name in objects if name not in summary.classes]
    if others:  # without them, a class that no object has is merely rare
        _compare_names(summary, list(objects))
    return objects.total(), Counter({'of other classes': sum(objects[name] for name in others)})


def _compare_names(summary: DatasetSummary, names: list[Any]) -> None:
    found = set(names)
    unknown = [name for name in summary.classes if name not in found]
    if unknown:
        summary.warnings.append(
            f'{summary.key}: no object is annotated as {preview(unknown)} ({len(unknown)} of {len(summary.classes)} '
            f'classes); the annotations have {preview(names)}. Set {summary.key}.metainfo.classes to these names.'
        )
