"""Summarize the datasets that a runner has built: images and objects per class, and what is skipped."""

import json
import os
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from glob import escape
from itertools import islice
from pathlib import Path
from typing import Any

from mmengine.dataset import BaseDataset

from mmevm.errors import ConfigError

# Modules whose LoadImageFromFile reads a local file, unless it has a backend.
_LOADERS = {'mmcv.transforms.loading', 'mmdet.datasets.transforms.loading', 'mmpretrain.datasets.transforms.loading'}


@dataclass
class DatasetSummary:
    """Number of images and objects of a dataset."""

    key: str  # dotted key in the config
    dataset: BaseDataset
    classes: tuple[str, ...]
    images: int
    objects: Counter = field(default_factory=Counter)  # by label; for a classifier, images
    ignored: int = 0  # objects with ignore_flag
    empty: int = 0  # images without objects
    is_detection: bool = False
    unlabeled: bool = False  # has images without known labels, as for self-supervised training
    total_images: int | None = None  # in the annotation file
    skipped: Counter = field(default_factory=Counter)  # objects in the annotation file that are not used, by reason
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        skipped = 0 if self.total_images is None else self.total_images - self.images
        text = f'{self.key} ({type(self.dataset).__name__}): {self.images} images'
        if skipped:
            filter_cfg = dict(getattr(self.dataset, 'filter_cfg', None) or {})
            text += f' of {self.total_images} ({skipped} skipped by filter_cfg={filter_cfg})'
        if self.is_detection:
            text += f'; {self.objects.total()} objects'
            text += f'; images without objects: {self.empty}' if self.empty else ''
            text += f'; objects to ignore: {self.ignored}' if self.ignored else ''
        return text + (f'; skipped objects: {self._reasons()}' if self.skipped else '')

    def _reasons(self) -> str:
        return ', '.join(f'{number} {reason}' for reason, number in self.skipped.most_common())

    def per_class(self) -> str:
        """Return the number of objects per class, most frequent first."""
        counts = sorted(((self.objects[i], name) for i, name in enumerate(self.classes)), reverse=True)
        shown = ', '.join(f'{name} {count}' for count, name in counts[:20])
        return shown + (f', and {len(counts) - 20} more classes' if len(counts) > 20 else '')

    def describe_empty(self) -> str:
        """Return why there is nothing to train on."""
        file = os.path.abspath(self.dataset.ann_file or self.dataset.data_root or '')
        if not self.total_images:
            return f'{self.key} has no images; {file} lists none. Correct {self.key}.ann_file and data_prefix.'
        reasons = f' (skipped objects: {self._reasons()})' if self.skipped else ''
        advice = f'Correct the annotations, {self.key}.metainfo.classes or {self.key}.filter_cfg.'
        text = f'{self.key}: none of the {self.total_images} images of {file} has an object to train on{reasons}.'
        return f'{text} {(self.warnings or [advice])[0]}'


def leaf_datasets(dataset: Any, key: str) -> Iterator[tuple[str, BaseDataset]]:
    """Yield datasets, also those in wrappers such as ``RepeatDataset``, with their dotted keys."""
    if isinstance(getattr(dataset, 'datasets', None), (list, tuple)):
        for i, item in enumerate(dataset.datasets):
            yield from leaf_datasets(item, f'{key}.datasets.{i}')
    elif hasattr(dataset, 'dataset'):
        yield from leaf_datasets(dataset.dataset, f'{key}.dataset')
    elif isinstance(dataset, BaseDataset):
        yield key, dataset


def summarize_all(datasets: dict[str, Any], max_images: int | None = None) -> list[DatasetSummary]:
    """Summarize the datasets of a run. Skip those of an unknown kind.

    Args:
        datasets: Built datasets or wrappers, by their dotted keys in the config. Keys of training data start with
            'train'.
        max_images: Skip larger datasets.

    Returns:
        A summary of each dataset, including those in wrappers.

    Raises:
        ConfigError: If there are no objects to train on, or a dataset cannot be used (see :func:`summarize`).
    """
    summaries = []
    for key, dataset in datasets.items():
        training, of_key, unknown = key.startswith('train'), [], False
        for leaf_key, leaf in leaf_datasets(dataset, key):
            if max_images is not None and len(leaf) > max_images:
                unknown = True
                continue
            try:
                of_key.append(summarize(leaf_key, leaf, training))
            except ConfigError:
                raise
            except Exception:  # a user's dataset may return anything
                unknown = True
        summaries += of_key
        if training and of_key and not unknown and not any(summary.objects or summary.unlabeled for summary in of_key):
            raise ConfigError(of_key[0].describe_empty())
    return summaries


def summarize(key: str, dataset: BaseDataset, training: bool) -> DatasetSummary:
    """Count images and objects of a dataset and look for mistakes.

    Args:
        key: Dotted key of the dataset in the config.
        dataset: The dataset, fully initialized.
        training: Whether it is used for training.

    Raises:
        ConfigError: If an image file is missing or empty, or the pipeline loads masks and an object has none.
    """
    classes = dataset.metainfo.get('classes') or ()
    summary = DatasetSummary(key, dataset, () if isinstance(classes, str) else tuple(classes), len(dataset))
    entries = [dataset.get_data_info(i) for i in range(len(dataset))]
    # an entry is an image, or a video with a list of images
    infos = [
        info for entry in entries for info in (entry['images'] if isinstance(entry.get('images'), list) else [entry])
    ]
    outside = flat = boxes = 0
    for info in infos:
        labels, instances = info.get('gt_label'), info.get('instances')
        if instances is None and labels is not None:
            summary.objects.update([int(labels)] if not hasattr(labels, '__iter__') else map(int, labels))
            continue
        summary.is_detection |= instances is not None
        summary.unlabeled |= instances is None
        used = [instance for instance in instances or () if not instance.get('ignore_flag')]
        summary.objects.update(instance['bbox_label'] for instance in used if 'bbox_label' in instance)
        summary.ignored += len(instances or ()) - len(used)
        summary.empty += instances is not None and not used
        if 'width' in info and 'height' in info:
            for left, top, right, bottom in (item['bbox'] for item in used if len(item.get('bbox', ())) == 4):
                boxes += 1
                flat += right <= left or bottom <= top
                outside += right > 1.02 * info['width'] + 1 or bottom > 1.02 * info['height'] + 1
    if outside > 0.2 * boxes:
        summary.warnings.append(
            f'{key}: {outside} of {boxes} boxes exceed their image. A COCO bbox is x, y, width, height; these look '
            'like x1, y1, x2, y2.'
        )
    filters = any(type(step).__name__ == 'FilterAnnotations' for step in _steps(dataset))
    if flat and training and not filters and getattr(dataset, 'bbox_min_size', None) is None:
        summary.warnings.append(
            f'{key}: {flat} of {boxes} boxes have no area, which can make losses infinite. Correct them, or add '
            "dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1)) after LoadAnnotations."
        )
    _check_image_files(key, dataset, infos)
    if training:
        _check_masks(key, dataset, infos)
    compare_with_file(summary, training)
    return summary


def compare_class_order(summaries: list[DatasetSummary]) -> Iterator[str]:
    """Warn if training and evaluation data give the same label to different classes."""
    train = [summary for summary in summaries if summary.key.startswith('train')]
    others = [summary for summary in summaries if not summary.key.startswith('train')]
    if len(train) != 1 or len(others) != 1 or type(train[0].dataset) is not type(others[0].dataset):
        return
    for label, (first, second) in enumerate(zip(train[0].classes, others[0].classes, strict=False)):
        if first != second:
            yield (
                f'{train[0].key} and {others[0].key} number their classes differently: {label} is {first!r} in one and '
                f'{second!r} in the other. Set the same metainfo.classes, or use the same class folders.'
            )
            return


def _steps(dataset: BaseDataset) -> list[Any]:
    return list(getattr(getattr(dataset, 'pipeline', None), 'transforms', None) or ())


def _check_image_files(key: str, dataset: BaseDataset, infos: list[dict]) -> None:
    loader = next(iter(_steps(dataset)), None)
    if (
        type(loader).__name__ != 'LoadImageFromFile'
        or type(loader).__module__ not in _LOADERS
        or getattr(loader, 'ignore_empty', False)
        or getattr(loader, 'file_client_args', None)
        or dict(getattr(loader, 'backend_args', None) or {}).get('backend', 'local') != 'local'
    ):
        return
    missing, empty = [], []
    for path in {info['img_path']: None for info in infos if isinstance(info.get('img_path'), str)}:
        try:
            if '://' not in path and not os.stat(path).st_size:
                empty.append(path)
        except OSError:
            missing.append(path)
    for files, problem in ((missing, 'missing'), (empty, 'empty')):
        if not files:
            continue
        path = Path(files[0])
        similar = next(path.parent.glob(f'{escape(path.stem)}.*'), path)
        hint = f' (found {similar.name}, but {type(dataset).__name__} reads {path.name})' if similar != path else ''
        raise ConfigError(
            f'{key}: {len(files)} of {len(infos)} image files are {problem}: {_preview(map(os.path.abspath, files))}'
            f'{hint}. Restore them, remove them from the annotations, or correct {key}.data_prefix.'
        )


def _check_masks(key: str, dataset: BaseDataset, infos: list[dict]) -> None:
    # Exactly this transform: those for panoptic or empty annotations also have with_mask, but read no instance masks.
    transform = ('mmdet.datasets.transforms.loading', 'LoadAnnotations')
    if not any(
        getattr(step, 'with_mask', False) and (type(step).__module__, type(step).__name__) == transform
        for step in _steps(dataset)
    ):
        return
    objects = [(info.get('img_path'), item) for info in infos for item in info.get('instances') or ()]
    without = [str(path) for path, item in objects if 'mask' not in item]
    if without:
        raise ConfigError(
            f'{key}: {len(without)} of {len(objects)} objects have no segmentation, but the pipeline loads masks '
            f'(with_mask=True): {_preview(dict.fromkeys(without))}. Add segmentations, set "ignore": 1, or use a '
            'detector without a mask head.'
        )


def compare_with_file(summary: DatasetSummary, training: bool) -> None:
    """Add to a summary what its annotation files contain beyond the dataset, for COCO and Pascal VOC formats."""
    dataset = summary.dataset
    file = getattr(dataset, 'ann_file', None)
    if not isinstance(file, str) or not os.path.isfile(file) or getattr(dataset, '_indices', None) is not None:
        return
    if hasattr(dataset, 'cat_ids') and file.endswith('.json'):
        _compare_with_coco(summary, json.loads(Path(file).read_bytes()), training)
    elif hasattr(dataset, 'ann_subdir'):
        _compare_with_voc(summary, voc_files(dataset), training)


def voc_files(dataset: Any) -> list[Path]:
    """Return the XML files of a dataset in Pascal VOC format; none for other datasets."""
    if not hasattr(dataset, 'ann_subdir'):
        return []
    names = filter(None, map(str.strip, Path(dataset.ann_file).read_text().split('\n')))
    return [Path(dataset.sub_data_root, dataset.ann_subdir, f'{name}.xml') for name in names]


def _compare_with_coco(summary: DatasetSummary, coco: dict, training: bool) -> None:
    key, wanted = summary.key, set(summary.dataset.cat_ids)
    names = [category.get('name') for category in coco.get('categories') or []]
    _compare_names(summary, names)
    images = {image.get('id'): image for image in coco.get('images') or []}
    summary.total_images = len(coco.get('images') or [])
    if not training:
        return
    for kind in ('images', 'annotations'):
        ids = Counter(entry.get('id') for entry in coco.get(kind) or [])
        if repeated := [id_ for id_, number in ids.items() if number > 1]:
            summary.warnings.append(
                f'{key}: {len(repeated)} ids of {kind} occur more than once ({_preview(repeated)}); only the last '
                'entry is read. Make the ids unique.'
            )
    ordered = [name for name in names if name in summary.classes]
    if ordered != [name for name in summary.classes if name in ordered]:
        summary.warnings.append(
            f'{key}.metainfo.classes has another order than the categories of the annotation file '
            f'({_preview(ordered)}). MMDetection numbers classes by the file, so names would be wrong. Use its order.'
        )
    reasons = Counter(_skip_reason(ann, images.get(ann.get('image_id')), wanted) for ann in coco['annotations'])
    reasons.pop('', None)
    _set_skipped(summary, reasons, len(coco['annotations']))


def _skip_reason(ann: dict, image: dict | None, wanted: set) -> str:
    """Return why MMDetection's CocoDataset skips an annotation; an empty string if it does not."""
    if image is None:
        return 'of images that are not listed'
    if ann.get('ignore'):
        return 'marked "ignore"'
    if ann.get('category_id') not in wanted:
        return 'of other classes'
    x, y, width, height = ann['bbox']
    inside = min(x + width, image['width']) > max(x, 0) and min(y + height, image['height']) > max(y, 0)
    return (
        '' if inside and ann['area'] > 0 and min(width, height) >= 1 else 'outside their image or smaller than a pixel'
    )


def _compare_with_voc(summary: DatasetSummary, files: list[Path], training: bool) -> None:
    summary.total_images = len(files)
    objects = Counter(found.text or '' for file in files for found in ET.parse(file).iterfind('object/name'))
    _compare_names(summary, list(objects), objects)
    if training:
        others = sum(number for name, number in objects.items() if name not in summary.classes)
        _set_skipped(summary, Counter({'of other classes': others}), objects.total())


def _set_skipped(summary: DatasetSummary, reasons: Counter, total: int) -> None:
    rest = total - summary.objects.total() - summary.ignored - reasons.total()
    summary.skipped = +(reasons + Counter({'in skipped images': max(0, rest)}))


def _compare_names(summary: DatasetSummary, names: list[str], objects: Counter | None = None) -> None:
    unknown = [name for name in summary.classes if name not in names]
    others = [name for name in names if name not in summary.classes]
    if unknown and (others or objects is None):
        annotated = _preview(f'{name} ({objects[name]})' if objects else name for name in names)
        summary.warnings.append(
            f'{summary.key}: no object is annotated as {_preview(unknown)} ({len(unknown)} of {len(summary.classes)} '
            f'classes); the annotations have {annotated}. Set {summary.key}.metainfo.classes to these names.'
        )


def _preview(names: Iterable[Any], limit: int = 5) -> str:
    """Join the first few of many names."""
    names = iter(names)
    first = [str(name) for name in islice(names, limit)]
    return ', '.join(first) + (', …' if next(names, None) is not None else '')
