"""What is in the data sets that a run has built: images and objects per class, and what is left out."""

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

# Loading transforms that need a local file for each image, unless they have a backend.
_LOADERS = {'mmcv.transforms.loading', 'mmdet.datasets.transforms.loading', 'mmpretrain.datasets.transforms.loading'}


@dataclass
class DatasetSummary:
    """Images and objects of one data set, as a training or an evaluation sees them.

    Attributes:
        key: Key of the data set in the config.
        dataset: The data set.
        classes: Names of its classes; empty if it has none.
        images: Number of images.
        objects: Number of objects (of a classifier, images) of each class.
        ignored: Number of objects that are regions to ignore.
        empty: Number of images without an object.
        is_detection: Whether its images are annotated with objects.
        unlabeled: Whether there are images without labels of a known kind, which may be all that is wanted.
        total_images: Number of images in the annotation file; None if it is not known.
        left_out: Objects of the annotation file that are not used, by the reason.
        warnings: One line each.
    """

    key: str
    dataset: BaseDataset
    classes: tuple[str, ...]
    images: int
    objects: Counter = field(default_factory=Counter)
    ignored: int = 0
    empty: int = 0
    is_detection: bool = False
    unlabeled: bool = False
    total_images: int | None = None
    left_out: Counter = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        left_out = 0 if self.total_images is None else self.total_images - self.images
        text = f'{self.key} ({type(self.dataset).__name__}): {self.images} images'
        text += f' of {self.total_images} ({left_out} left out by filter_cfg={self.filter_cfg})' if left_out else ''
        if self.is_detection:
            text += f'; {self.objects.total()} objects'
            text += f'; images without an object: {self.empty}' if self.empty else ''
            text += f'; regions to ignore: {self.ignored}' if self.ignored else ''
        if self.left_out:
            text += '; objects left out: ' + ', '.join(f'{n} {why}' for why, n in self.left_out.most_common())
        return text

    @property
    def filter_cfg(self) -> dict:
        """What leaves images out."""
        return dict(getattr(self.dataset, 'filter_cfg', None) or {})

    def per_class(self) -> str:
        """Return the number of objects of each class, most frequent first."""
        counts = [(self.objects[i], name) for i, name in enumerate(self.classes)]
        shown = [f'{name} {count}' for count, name in sorted(counts, reverse=True)[:20]]
        return ', '.join(shown) + (f', and {len(counts) - 20} more classes' if len(counts) > 20 else '')


def leaf_datasets(dataset: Any, key: str) -> Iterator[tuple[str, BaseDataset]]:
    """Yield the data sets within wrappers such as ``RepeatDataset`` and ``ConcatDataset``, with their keys."""
    if isinstance(getattr(dataset, 'datasets', None), (list, tuple)):
        for i, item in enumerate(dataset.datasets):
            yield from leaf_datasets(item, f'{key}.datasets.{i}')
    elif hasattr(dataset, 'dataset'):
        yield from leaf_datasets(dataset.dataset, f'{key}.dataset')
    elif isinstance(dataset, BaseDataset):
        yield key, dataset


def summarize(key: str, dataset: BaseDataset, training: bool) -> DatasetSummary:
    """Count what is in a data set, and look for what cannot be trained on.

    Args:
        key: Key of the data set in the config.
        dataset: The data set, loaded.
        training: Whether it is trained on.

    Returns:
        The counts, and warnings.

    Raises:
        ConfigError: If an image file is missing or empty, or an object has no mask where masks are loaded.
    """
    classes = dataset.metainfo.get('classes') or ()
    summary = DatasetSummary(key, dataset, () if isinstance(classes, str) else tuple(classes), len(dataset))
    infos = [info for i in range(len(dataset)) for info in _images(dataset.get_data_info(i))]
    outside = boxes = flat = 0
    for info in infos:
        labels = info.get('gt_label')
        instances = info.get('instances')
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
            for instance in used:
                if len(instance.get('bbox', ())) == 4:
                    boxes += 1
                    left, top, right, bottom = instance['bbox']
                    flat += right <= left or bottom <= top
                    outside += right > 1.02 * info['width'] + 1 or bottom > 1.02 * info['height'] + 1
    if outside > 0.2 * boxes:
        summary.warnings.append(
            f'{key}: {outside} of {boxes} boxes leave their image. In COCO format a bbox is x, y, width, height; these '
            'look like x1, y1, x2, y2.'
        )
    filters = any(type(step).__name__ == 'FilterAnnotations' for step in _steps(dataset))
    if flat and training and not filters and getattr(dataset, 'bbox_min_size', None) is None:
        summary.warnings.append(
            f'{key}: {flat} of {boxes} boxes have no area, of which losses become infinite. Correct them, or put '
            "dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1)) behind LoadAnnotations."
        )
    _check_image_files(key, dataset, infos)
    if training:
        _check_masks(key, dataset, infos)
    _compare_with_file(summary, training)
    return summary


def describe_empty(key: str, dataset: BaseDataset) -> str:
    """Say why a data set has no image that can be trained on."""
    summary = DatasetSummary(key, dataset, tuple(dataset.metainfo.get('classes') or ()), 0)
    _compare_with_file(summary, training=True)
    file = os.path.abspath(dataset.ann_file or dataset.data_root or '')
    if not summary.total_images:
        return f'{key} has no images: none are listed in {file}. Correct {key}.ann_file and {key}.data_prefix.'
    advice = f'Correct the annotations, {key}.metainfo.classes or {key}.filter_cfg.'
    reasons = ', '.join(f'{n} {why}' for why, n in summary.left_out.most_common())
    return ' '.join(
        [
            f'{key}: none of the {summary.total_images} images of {file} is left to train on'
            + (f' (objects left out: {reasons}).' if reasons else '.'),
            (summary.warnings or [advice])[0],
        ]
    )


def summarize_all(datasets: dict[str, Any], max_images: int | None = None) -> list[DatasetSummary]:
    """Summarize the data sets of a run, as far as they are understood.

    Args:
        datasets: Built data sets, wrappers included, by their keys in the config; those to train on begin with 'train'.
        max_images: Larger data sets are passed over; None for none.

    Returns:
        A summary of each data set within them.

    Raises:
        ConfigError: If there is no object to train on, or as :func:`summarize` says.
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
            except Exception:  # a data set of other rules than those that are known here
                unknown = True
        summaries += of_key
        if training and of_key and not unknown and not any(summary.objects or summary.unlabeled for summary in of_key):
            raise ConfigError(describe_empty(of_key[0].key, of_key[0].dataset))
    return summaries


def different_classes(summaries: list[DatasetSummary]) -> Iterator[str]:
    """Warn if training and evaluation number their classes differently."""
    train = [summary for summary in summaries if summary.key.startswith('train')]
    others = [summary for summary in summaries if not summary.key.startswith('train')]
    if len(train) == len(others) == 1:  # of several, each has labels of its own
        first, second = train[0], others[0]
        labels = enumerate(zip(first.classes, second.classes, strict=False))
        different = next(((label, *names) for label, names in labels if names[0] != names[1]), None)
        if type(first.dataset) is type(second.dataset) and different:
            yield (
                '{} and {} number their classes differently: {} is {!r} in one and {!r} in the other. Give both the '
                'same metainfo.classes (of image folders: the same folders).'.format(first.key, second.key, *different)
            )


def _images(info: dict) -> list[dict]:
    """The images of an entry: one, or the frames of a video."""
    return info['images'] if isinstance(info.get('images'), list) else [info]


def _steps(dataset: BaseDataset) -> list[Any]:
    return list(getattr(getattr(dataset, 'pipeline', None), 'transforms', None) or ())


def _check_image_files(key: str, dataset: BaseDataset, infos: list[dict]) -> None:
    steps = _steps(dataset)
    loader = steps[0] if steps else None
    if (
        type(loader).__name__ != 'LoadImageFromFile'
        or type(loader).__module__ not in _LOADERS
        or getattr(loader, 'ignore_empty', False)
        or _is_remote(getattr(loader, 'backend_args', None))
        or getattr(loader, 'file_client_args', None)
    ):
        return
    missing, empty = [], []
    for path in {info['img_path']: None for info in infos if isinstance(info.get('img_path'), str)}:
        if '://' in path:
            continue
        try:
            if not os.stat(path).st_size:
                empty.append(path)
        except OSError:
            missing.append(path)
    for files, what in ((missing, 'missing'), (empty, 'empty')):
        if files:
            path = Path(files[0])
            other = next((file for file in path.parent.glob(f'{escape(path.stem)}.*') if what == 'missing'), None)
            found = f' (there is {other.name}, but {type(dataset).__name__} looks for {path.name})' if other else ''
            raise ConfigError(
                f'{key}: {len(files)} of its {len(infos)} image files are {what}: '
                f'{_preview(map(os.path.abspath, files))}{found}. Restore them, '
                f'remove them from the annotations, or correct {key}.data_prefix.'
            )


def _is_remote(backend_args: Any) -> bool:
    return bool(backend_args) and dict(backend_args).get('backend', 'local') != 'local'


def _check_masks(key: str, dataset: BaseDataset, infos: list[dict]) -> None:
    # Exactly this transform: those for panoptic or empty annotations have with_mask too, and need no masks of objects.
    loads_masks = any(
        getattr(step, 'with_mask', False)
        and (type(step).__module__, type(step).__name__) == ('mmdet.datasets.transforms.loading', 'LoadAnnotations')
        for step in _steps(dataset)
    )
    if not loads_masks:
        return
    without = [info.get('img_path') for info in infos for item in info.get('instances') or () if 'mask' not in item]
    if without and len(without) == sum(len(info.get('instances') or ()) for info in infos):
        raise ConfigError(
            f'{key}: its objects have no segmentation, but the pipeline loads masks (with_mask=True). Use a detector '
            'without a mask head, or annotate masks.'
        )
    if without:
        raise ConfigError(
            f'{key}: {len(without)} objects have no segmentation, but the pipeline loads masks (with_mask=True): '
            f'{_preview(dict.fromkeys(map(str, without)))}. Add their masks, or set "ignore": 1.'
        )


def _compare_with_file(summary: DatasetSummary, training: bool) -> None:
    """Count what the annotation files hold beyond the data set, if they are of COCO's or Pascal VOC's format."""
    dataset = summary.dataset
    file = getattr(dataset, 'ann_file', None)
    if not isinstance(file, str) or not os.path.isfile(file) or getattr(dataset, '_indices', None) is not None:
        return
    if hasattr(dataset, 'cat_ids') and file.endswith('.json'):
        _compare_with_coco(summary, json.loads(Path(file).read_bytes()), training)
    elif hasattr(dataset, 'ann_subdir'):
        _compare_with_voc(summary, _voc_files(dataset), training)


def _voc_files(dataset: Any) -> list[Path]:
    names = Path(dataset.ann_file).read_text().split('\n')
    return [Path(dataset.sub_data_root, dataset.ann_subdir, f'{name.strip()}.xml') for name in names if name.strip()]


def find_unreadable_xml(dataset: Any) -> Path | None:
    """Return the first annotation file, in Pascal VOC's format, that the data set cannot read."""
    for file in _voc_files(dataset) if hasattr(dataset, 'ann_subdir') else ():
        try:
            image = os.path.join(dataset.img_subdir, f'{file.stem}.jpg')
            dataset.parse_data_info(dict(img_id=file.stem, file_name=image, xml_path=str(file)))
        except Exception:
            return file
    return None


def _compare_with_coco(summary: DatasetSummary, coco: dict, training: bool) -> None:
    key, wanted = summary.key, set(summary.dataset.cat_ids)
    names = [category.get('name') for category in coco.get('categories') or []]
    _compare_names(summary, names)
    images = {image.get('id'): image for image in coco.get('images') or []}
    summary.total_images = len(coco.get('images') or [])
    if not training:
        return
    for what, entries in (('image', coco.get('images')), ('annotation', coco.get('annotations'))):
        twice = [id_ for id_, n in Counter(entry.get('id') for entry in entries or []).items() if n > 1]
        if twice:
            summary.warnings.append(
                f'{key}: {len(twice)} {what} ids occur more than once ({_preview(twice)}), and only the last entry of '
                'each is read. Give each a number of its own.'
            )
    reasons = Counter(_coco_reason(ann, images.get(ann.get('image_id')), wanted) for ann in coco['annotations'])
    reasons.pop('', None)
    ordered = [name for name in names if name in summary.classes]
    if ordered != [name for name in summary.classes if name in ordered]:
        summary.warnings.append(
            f'{key}.metainfo.classes is not in the order of the categories in the annotation file '
            f'({_preview(ordered)}), by which MMDetection numbers them: names will be wrong. Use that order.'
        )
    summary.left_out = _known(reasons, len(coco['annotations']), summary)


def _coco_reason(ann: dict, image: dict | None, wanted: set) -> str:
    """Why MMDetection's CocoDataset does not read an annotation; nothing if it does."""
    if image is None:
        return 'of images that are not listed'
    if ann.get('ignore'):
        return 'marked "ignore"'
    if ann.get('category_id') not in wanted:
        return 'of other classes'
    x, y, width, height = ann['bbox']
    inside = min(x + width, image['width']) > max(x, 0) and min(y + height, image['height']) > max(y, 0)
    if not inside:
        return 'outside their image or without area'
    if ann['area'] <= 0 or width < 1 or height < 1:
        return 'without area or thinner than a pixel'
    return ''


def _compare_with_voc(summary: DatasetSummary, files: list[Path], training: bool) -> None:
    summary.total_images = len(files)
    objects = Counter(
        (found.text or '') for file in files for found in ET.parse(file).getroot().iterfind('object/name')
    )
    _compare_names(summary, list(objects), of_objects=objects)
    if training:
        others = sum(number for name, number in objects.items() if name not in summary.classes)
        summary.left_out = _known(Counter({'of other classes': others} if others else {}), objects.total(), summary)


def _known(reasons: Counter, total: int, summary: DatasetSummary) -> Counter:
    """The reasons, and as a further one what is left out with its image."""
    rest = total - summary.objects.total() - summary.ignored - reasons.total()
    return reasons + Counter({'in images that are left out': rest} if rest > 0 else {})


def _compare_names(summary: DatasetSummary, names: list[str], of_objects: Counter | None = None) -> None:
    unknown = [name for name in summary.classes if name not in names]
    others = [name for name in names if name not in summary.classes]
    if unknown and (others or of_objects is None):
        annotated = _preview(f'{name} ({of_objects[name]})' if of_objects else name for name in names)
        summary.warnings.append(
            f'{summary.key}: no object is annotated as {_preview(unknown)}, {len(unknown)} of its '
            f'{len(summary.classes)} classes; the annotations have {annotated}. Set {summary.key}.metainfo.classes to '
            'these names.'
        )


def _preview(names: Iterable[Any], limit: int = 5) -> str:
    """The first few of many names."""
    names = iter(names)
    first = [str(name) for name in islice(names, limit)]
    return ', '.join(first) + (', …' if next(names, None) is not None else '')
