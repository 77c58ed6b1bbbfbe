"""Annotations and image files, each looked at once before a training: what cannot be read, and what would be left out.

MMDetection leaves out images and objects without a word. The rules here are those of its ``CocoDataset``.
"""

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from .data import SUFFIXES, classes_of, datasets, folder_of_classes, is_remote, join_path, kind_of
from .errors import ConfigError, some


def check_annotations(cfg: Config, splits: Sequence[str]) -> list[str]:
    """Make sure that annotations can be trained on and that no image file is missing or empty.

    Of several processes the first one does so, for all of them.

    Args:
        cfg: A config for mmengine's runner.
        splits: Those of 'train', 'val' and 'test' that are about to be used.

    Returns:
        A sentence on each dataset to train on that leaves something out, or tells how much there is.

    Raises:
        ConfigError: If a file is missing, empty or contradicts itself; the message names it.
    """
    if _rank():
        return []
    scope, notes = cfg.get('default_scope'), []
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        for key, dataset in datasets(loader['dataset'], f'{split}_dataloader.dataset') if loader else ():
            training = split == 'train' and not dataset.get('test_mode')
            if _is_coco(kind_of(dataset['type'], scope)):
                notes += _check_coco(key, dataset, classes_of(dataset, scope) or (), training)
            elif scope == 'mmpretrain' and (root := folder_of_classes(dataset, scope)):
                notes += _check_folders(key, dataset, root, training)
    return notes


def _rank() -> int:
    names = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')  # of torchrun, SLURM, MPI
    return next((int(os.environ[name]) for name in names if name in os.environ), 0)


def _is_coco(kind: Any) -> bool:
    """Whether a dataset reads annotations as mmdet's CocoDataset, and not by rules of its own."""
    from mmdet.datasets import CocoDataset

    methods = ('load_data_list', 'parse_data_info', 'filter_data')
    return all(getattr(kind, name, None) is getattr(CocoDataset, name) for name in methods)


def _check_coco(key: str, dataset: dict, classes: tuple[str, ...], training: bool) -> list[str]:
    path = join_path(dataset, dataset.get('ann_file') or '')
    if is_remote(path, dataset):
        return []
    coco = _read(key, path)
    images, annotations = _indexed(key, path, coco)
    wanted = {category['id'] for category in coco.get('categories') or [] if category['name'] in classes}
    of_classes = {ann['image_id'] for ann in coco.get('annotations') or [] if ann['category_id'] in wanted}

    # What mmdet keeps: objects by what they are, then images by what they show and by their size.
    filter_cfg = (training and dataset.get('filter_cfg')) or {}
    masks = _loads_masks(dataset) if training else None
    kept, images_left_out, fates = [], Counter[str](), Counter[str]()
    without_objects = 0
    for id_, image in images.items():
        own = Counter(_fate(ann, image, wanted, masks) for ann in annotations[id_])
        if reason := _reason_against_image(image, id_ in of_classes, filter_cfg):
            images_left_out[reason] += 1
            own['in images left out'] = own.pop(_TRAINED, 0)
        else:
            kept.append(image)
            without_objects += not own[_TRAINED]
            if masks is not None:
                _check_masks(key, path, image, [ann for ann in annotations[id_] if _is_read(ann, image, wanted)])
        fates += own
    _check_files(key, dataset, path, kept)
    if not training or dataset.get('indices'):
        return []
    if not kept:
        raise ConfigError(
            f'{key}: none of the {len(images)} images of {path} is left to train on ({_counted(images_left_out)}): '
            f'correct the annotations, {key}.metainfo.classes or {key}.filter_cfg.'
        )
    fates['of images that are not listed'] = sum(len(anns) for id_, anns in annotations.items() if id_ not in images)
    number, trained = fates.total(), fates.pop(_TRAINED, 0)
    note = f'{key}: {len(kept)} of {len(images)} images of {path} are trained on'
    note += f', {without_objects} of them without an object' if without_objects else ''
    note += f'; left out: {_counted(images_left_out)}' if images_left_out else ''
    note += f'. {trained} of {number} objects are trained on'
    note += f'; left out: {_counted(fates)}.' if fates.total() else '.'
    return [note]


_TRAINED = ''


def _reason_against_image(image: dict, has_annotation: bool, filter_cfg: dict) -> str:
    """Why an image is left out; nothing if it is not."""
    if filter_cfg.get('filter_empty_gt') and not has_annotation:
        return 'without an annotation of its classes (filter_cfg.filter_empty_gt)'
    if min(image['width'], image['height']) < filter_cfg.get('min_size', 0):
        return f'with a side below {filter_cfg["min_size"]} pixels (filter_cfg.min_size)'
    return ''


def _fate(ann: dict, image: dict, wanted: set, masks: dict | None) -> str:
    """Why an object is not trained on; ``_TRAINED`` if it is."""
    x, y, width, height = ann['bbox']
    inside_x = min(x + width, image['width']) - max(x, 0)
    inside_y = min(y + height, image['height']) - max(y, 0)
    if ann.get('ignore'):
        return 'marked to be ignored'
    if inside_x <= 0 or inside_y <= 0:
        return 'outside of their image or of no area'
    if ann['area'] <= 0 or width < 1 or height < 1:
        return 'of no area or thinner than a pixel'
    if ann['category_id'] not in wanted:
        return 'of other categories'
    if ann.get('iscrowd'):
        return _CROWD
    if masks is not None and not _has_shape(ann.get('segmentation'), masks.get('poly2mask', True)):
        return _SHAPELESS
    return _TRAINED


# Read nevertheless, as regions that are neither object nor ground.
_CROWD, _SHAPELESS = 'crowds (ignored regions)', 'without a valid mask (ignored regions)'


def _is_read(ann: dict, image: dict, wanted: set) -> bool:
    return _fate(ann, image, wanted, None) in (_TRAINED, _CROWD)


def _has_shape(segmentation: Any, bitmaps: bool) -> bool:
    if isinstance(segmentation, dict):
        counts, size = segmentation.get('counts'), segmentation.get('size')
        return bitmaps and isinstance(counts, (list, str)) and size is not None
    return any(len(polygon) % 2 == 0 and len(polygon) >= 6 for polygon in segmentation or ())


def _loads_masks(dataset: dict) -> dict | None:
    """The step of the pipeline that loads masks."""
    steps = [step for step in dataset.get('pipeline') or [] if isinstance(step, dict) and step.get('with_mask')]
    return steps[0] if steps else None


def _check_masks(key: str, path: str, image: dict, annotations: list[dict]) -> None:
    empty = [ann['id'] for ann in annotations if not ann.get('segmentation')]
    if empty:
        raise ConfigError(
            f'{key}: {path} has no segmentation for the annotations {some(empty)} of {image["file_name"]!r}, but the '
            'pipeline loads masks (with_mask=True): give them one, or set their "ignore".'
        )
    size = [image['height'], image['width']]
    for ann in annotations:
        mask = ann['segmentation']
        if isinstance(mask, dict) and mask.get('size') is not None and list(mask['size']) != size:
            raise ConfigError(
                f'{key}: {path} has a mask of {mask["size"]} pixels for annotation {ann["id"]}, but its image '
                f'{image["file_name"]} has height and width {size}: make the mask anew.'
            )


def _read(key: str, path: str) -> dict:
    try:
        coco = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f'{key}.ann_file: {path} is not whole ({error}): fetch it or write it again.') from error
    if not isinstance(coco, dict) or not isinstance(coco.get('images'), list):
        raise ConfigError(f'{key}.ann_file: {path} has no list of "images", as COCO\'s annotations have.')
    return coco


def _indexed(key: str, path: str, coco: dict) -> tuple[dict[Any, dict], dict[Any, list[dict]]]:
    """Images by their ids, and annotations by those of their images, if every one of them can be read."""
    listed = coco.get('annotations') or []
    for name, entries, fields in (
        ('image', coco['images'], ('id', 'file_name', 'width', 'height')),
        ('annotation', listed, ('id', 'image_id', 'category_id', 'bbox', 'area')),
    ):
        for i, entry in enumerate(entries):
            if missing := [field for field in fields if field not in entry]:
                raise ConfigError(f'{key}.ann_file: {path} has no {some(missing)} for its {name} number {i + 1}.')
        twice = [id_ for id_, count in Counter(entry['id'] for entry in entries).items() if count > 1]
        if twice:
            raise ConfigError(
                f'{key}.ann_file: {path} has several {name}s of one id ({some(twice)}), of which only the last would '
                'be read: number them anew.'
            )
    wrong = [ann['id'] for ann in listed if not _is_box(ann['bbox'])]
    if wrong:
        raise ConfigError(
            f'{key}.ann_file: {path} has a bbox that is not four numbers x, y, width, height in the annotations '
            f'{some(wrong)}.'
        )
    annotations = defaultdict(list)
    for ann in listed:
        annotations[ann['image_id']].append(ann)
    return {image['id']: image for image in coco['images']}, annotations


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, list) and len(box) == 4 and all(isinstance(x, (int, float)) and math.isfinite(x) for x in box)
    )


def _check_files(key: str, dataset: dict, path: str, images: list[dict]) -> None:
    prefix = dataset.get('data_prefix') or {}
    folder = join_path(dataset, prefix.get('img', '') if isinstance(prefix, dict) else prefix)
    if not is_remote(folder, dataset):
        _check_sizes(key, [os.path.join(folder, image['file_name']) for image in images], f'images of {path}')


def _check_sizes(key: str, files: Sequence[str], of_what: str) -> None:
    missing, empty = [], []
    for file in files:
        try:
            if not os.stat(file).st_size:
                empty.append(file)
        except OSError:
            missing.append(file)
    for bad, what in ((missing, 'missing'), (empty, 'empty files')):
        if bad:
            raise ConfigError(
                f'{key}: {len(bad)} of the {len(files)} {of_what} are {what}, {some(bad, 3)}: fetch them again, or '
                'take them out of the data.'
            )


def _check_folders(key: str, dataset: dict, root: str, training: bool) -> list[str]:
    """Of images in one folder for each class, files of other kinds are left out."""
    suffixes = tuple(dataset.get('extensions') or SUFFIXES)
    images: list[str] = []
    others: list[str] = []
    for file in _files_below(root):
        (images if file.lower().endswith(suffixes) else others).append(file)
    _check_sizes(key, images, f'images of {root}')
    if not training:
        return []
    note = f'{key}: {len(images)} images of {root} are trained on'
    if others:
        note += f'; left out: {len(others)} files that do not end in {", ".join(suffixes)} ({some(others, 3)})'
    return [f'{note}.']


def _files_below(root: str) -> Iterator[str]:
    for folder, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        if not os.path.samefile(folder, root):  # a file beside the folders belongs to no class
            yield from (os.path.join(folder, name) for name in sorted(names))


def _counted(counter: Counter[str]) -> str:
    return ', '.join(f'{number} {what}' for what, number in counter.most_common() if number)
