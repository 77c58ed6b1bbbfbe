"""Whether the data is there, and whether its classes are those of the annotations and of the model."""

import json
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.fileio import list_from_file
from mmengine.registry import DATASETS

from .errors import ConfigError, some

# Modules whose `num_classes` is the number of classes of the dataset.
CLASSIFYING = ('bbox_head', 'mask_head', 'head')
# What mmpretrain takes for an image.
SUFFIXES = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')


def check_data(cfg: Config, splits: Sequence[str]) -> None:
    """Make sure that the data of some splits is there, and that its classes are those of annotations and model.

    Args:
        cfg: A config for mmengine's runner.
        splits: Those of 'train', 'val' and 'test' that are about to be used.

    Raises:
        ConfigError: If a file or folder is missing, or if classes do not fit.
    """
    scope = cfg.get('default_scope')
    class_folders = {}
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        if loader is None:
            continue
        for key, dataset in datasets(loader['dataset'], f'{split}_dataloader.dataset'):
            _check_files(key, dataset)
            classes = classes_of(dataset, scope)
            if scope == 'mmpretrain' and (folders := _class_folders(key, dataset, scope, training=split == 'train')):
                class_folders[key] = folders
                _check_same_folders(class_folders)
                _check_names_of_folders(key, classes or folders, folders)
                classes = classes or folders
            if classes is not None:
                _check_annotated_classes(key, dataset, classes)
                _check_num_classes(key, classes, cfg)
        evaluators = cfg.get(f'{split}_evaluator') or []
        for evaluator in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
            _check_topk(f'{split}_evaluator', evaluator, cfg['model'])
            if evaluator.get('ann_file') and is_missing(evaluator['ann_file'], evaluator):
                raise ConfigError(
                    f'{split}_evaluator.ann_file: there is no {evaluator["ann_file"]}. It has to name the '
                    f'annotations of {split}_dataloader; --data-root DIR changes both.'
                )


def datasets(dataset: dict, key: str) -> Iterator[tuple[str, dict]]:
    """The datasets within wrappers such as RepeatDataset or ConcatDataset."""
    if 'dataset' in dataset:
        yield from datasets(dataset['dataset'], f'{key}.dataset')
    elif 'datasets' in dataset:
        for i, part in enumerate(dataset['datasets']):
            yield from datasets(part, f'{key}.datasets.{i}')
    else:
        yield key, dataset


def join_path(dataset: dict, path: str) -> str:
    """A path below the root of a dataset, as mmengine joins it."""
    root = dataset.get('data_root') or ''
    return path if '://' in path or not root else f'{root.rstrip("/")}/{path}' if not path.startswith('/') else path


def is_remote(path: str, owner: dict) -> bool:
    """Whether mmengine reads a path from elsewhere: by its own scheme, or by a backend that may map it to another."""
    return '://' in path or (owner.get('backend_args') or {}).get('backend', 'local') != 'local'


def is_missing(path: str, owner: dict) -> bool:
    """Whether a local path is not there."""
    return not is_remote(path, owner) and not Path(path).exists()


def _check_files(key: str, dataset: dict) -> None:
    prefix = dataset.get('data_prefix') or {}
    prefixes = prefix if isinstance(prefix, dict) else {'': prefix}
    wanted = {f'data_prefix.{name}'.rstrip('.'): path for name, path in prefixes.items() if isinstance(path, str)}
    if dataset.get('ann_file'):
        wanted['ann_file'] = dataset['ann_file']
    for name, path in wanted.items():
        path = join_path(dataset, path)
        if is_missing(path, dataset):
            raise ConfigError(
                f'{key}.{name}: there is no {path}. Put the data there, or a link to it (for COCO: '
                'ln -s /path/to/coco data/coco), name its place with --data-root DIR, or change '
                'data_root, ann_file and data_prefix in the config.'
            )


def kind_of(name: str | type, scope: str | None) -> Any:
    """The class of a dataset's type."""
    with DATASETS.switch_scope_and_registry(scope) as registry:
        return name if isinstance(name, type) else registry.get(name)


def classes_of(dataset: dict, scope: str | None) -> tuple[str, ...] | None:
    """The classes of a dataset, given or of its type; None if neither names any."""
    classes = (dataset.get('metainfo') or {}).get('classes')
    if classes is None:
        classes = getattr(kind_of(dataset['type'], scope), 'METAINFO', {}).get('classes')
    if isinstance(classes, str):  # the name of the only class, or of a file with one name a line
        classes = list_from_file(classes) if Path(classes).is_file() else [classes]
    return None if classes is None else tuple(classes)


def folder_of_classes(dataset: dict, scope: str | None) -> str | None:
    """Where mmpretrain looks for one folder for each class; None if it reads a list of files, or from elsewhere."""
    kind, by_folders = kind_of(dataset['type'], scope), kind_of('CustomDataset', scope)
    if not (isinstance(kind, type) and issubclass(kind, by_folders)) or not dataset.get('with_label', True):
        return None
    split = dataset.get('split') or ''
    if split == 'test' or dataset.get('ann_file') or (split and Path(join_path(dataset, f'meta/{split}.txt')).exists()):
        return None
    prefix = dataset.get('data_prefix') or split
    root = join_path(dataset, prefix.get('img_path', '') if isinstance(prefix, dict) else prefix)
    return None if is_remote(root, dataset) else root


def _class_folders(key: str, dataset: dict, scope: str, training: bool) -> tuple[str, ...] | None:
    """The folders after which mmpretrain numbers its classes; None if they come from elsewhere."""
    if dataset.get('split') and kind_of(dataset['type'], scope) is kind_of('CustomDataset', scope):
        raise ConfigError(
            f"{key}: a CustomDataset has no split={dataset['split']!r}, which comes from the config's _base_: give the "
            f'dataset _delete_=True, and data_prefix={dataset["split"]!r}.'
        )
    root = folder_of_classes(dataset, scope)
    if root is None:
        return None
    if not Path(root).is_dir():
        raise ConfigError(
            f'{key}: there is no folder {root}. Put the images there, in one folder for each class, or name their '
            'place with --data-root DIR or data_root in the config.'
        )
    folders = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir()))
    if not folders:
        raise ConfigError(f'{key}: {root} has no folders, but needs one for each class.')
    suffixes = tuple(dataset.get('extensions') or SUFFIXES)
    empty = [name for name in folders if not _has_image(Path(root, name), suffixes)]
    if empty and training:
        raise ConfigError(
            f'{key}: {len(empty)} of the {len(folders)} folders of classes in {root} have no image, {some(empty)}: '
            f'fill them (with files of {", ".join(suffixes)}), or remove them and set num_classes.'
        )
    return folders


def _has_image(folder: Path, suffixes: tuple[str, ...]) -> bool:
    return any(
        entry.name.lower().endswith(suffixes) if entry.is_file() else _has_image(Path(entry), suffixes)
        for entry in os.scandir(folder)
    )


def _check_names_of_folders(key: str, classes: tuple[str, ...], folders: tuple[str, ...]) -> None:
    if len(classes) != len(folders):
        raise ConfigError(
            f'{key} has {len(classes)} classes ({some(classes)}), but {len(folders)} folders of them '
            f'({some(folders)}): give it metainfo=dict(classes=…), or replace it by dict(_delete_=True, '
            "type='CustomDataset', data_root=…, data_prefix=…, pipeline=…), which names its classes after the folders."
        )
    if classes != folders and sorted(classes) == list(folders):
        raise ConfigError(
            f'{key}: a label is the number of the sorted folders ({some(folders)}), but metainfo.classes has another '
            f'order ({some(classes)}): give it that of the folders, or leave it out.'
        )


def _check_same_folders(class_folders: dict[str, tuple[str, ...]]) -> None:
    (first, expected), *others = class_folders.items()
    for key, folders in others:
        differing = sorted(set(folders) ^ set(expected))
        if differing:
            raise ConfigError(
                f'{first} and {key} have different folders of classes ({some(differing)} are in one of them only), '
                'so their labels, the numbers of the sorted folders, would mean different things: make them the same; '
                'a folder of evaluation may be empty.'
            )


def _check_annotated_classes(key: str, dataset: dict, classes: tuple[str, ...]) -> None:
    path = join_path(dataset, dataset.get('ann_file') or '')
    if not path.endswith('.json') or is_remote(path, dataset):
        return
    if not Path(path).stat().st_size:
        raise ConfigError(f'{key}.ann_file: {path} is empty: fetch it or write it again.')
    annotated = _category_names(path)
    if annotated is None:
        return
    unknown = [name for name in classes if name not in annotated]
    if unknown:
        raise ConfigError(
            f'{key}: {len(unknown)} of its {len(classes)} classes, {some(unknown)}, are not among the categories of '
            f'{path}, which are {some(annotated)}; their objects would silently be skipped. '
            f'Set {key}.metainfo.classes to these names.'
        )


def _category_names(path: str) -> list[str] | None:
    """Names in the "categories" of a COCO file, without parsing the half gigabyte around them; None if it has none."""
    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        at = text.rfind(b'"categories"')
        start = text.find(b'[', at)
        if at < 0 or start < 0:
            return None
        # Where the list ends is not known before it is decoded, so decode ever longer pieces.
        length = 2**16
        while True:
            piece = text[start : start + length].decode(errors='ignore')
            try:
                categories, _ = json.JSONDecoder().raw_decode(piece)
            except json.JSONDecodeError:
                if start + length >= len(text):
                    return None
                length *= 16
            else:
                return [category['name'] for category in categories]


def _check_num_classes(key: str, classes: tuple[str, ...], cfg: Config) -> None:
    preprocessor = cfg.get('data_preprocessor') or {}  # mixup makes vectors of num_classes
    counted = [('data_preprocessor', preprocessor)] if 'num_classes' in preprocessor else []
    for name, head in [*_heads(cfg['model'], 'model'), *counted]:
        if head['num_classes'] != len(classes):
            raise ConfigError(
                f'{name}.num_classes={head["num_classes"]}, but {key} has {len(classes)} classes ({some(classes)}): '
                f'set {name}.num_classes={len(classes)} or correct {key}.metainfo.classes.'
            )


def _check_topk(key: str, evaluator: dict, model: dict) -> None:
    topk = evaluator.get('topk') or ()
    most = max(topk, default=0) if isinstance(topk, (list, tuple)) else topk
    for name, head in _heads(model, 'model'):
        if most > head['num_classes']:
            raise ConfigError(
                f'{key}.topk={topk}, but {name}.num_classes={head["num_classes"]}: set {key}.topk=(1,), in '
                'val_evaluator and in test_evaluator.'
            )


def _heads(value: Any, key: str) -> Iterator[tuple[str, dict]]:
    for name, part in parts(value, key):
        if name.rstrip('.0123456789').rsplit('.', 1)[-1] in CLASSIFYING and 'num_classes' in part:
            yield name, part


def parts(value: Any, key: str) -> Iterator[tuple[str, dict]]:
    """All dicts within a part of a config, itself first, with their keys."""
    if isinstance(value, dict):
        yield key, value
        for name, item in value.items():
            yield from parts(item, f'{key}.{name}')
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from parts(item, f'{key}.{i}')
