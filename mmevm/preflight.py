"""Mistakes of a config, found before anything is built: what else would end a run hours later, or train on nothing."""

import json
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS

# Modules whose `num_classes` is the number of classes of the dataset.
CLASSIFYING = ('bbox_head', 'mask_head', 'head')


class ConfigError(RuntimeError):
    """A config that cannot be meant as it is; the message names the key and what to do."""


def check_config(cfg: Config, splits: Sequence[str]) -> None:
    """Make sure that the data is there and that its classes are those of the annotations and of the model.

    Args:
        cfg: A config for mmengine's runner.
        splits: Those of 'train', 'val' and 'test' that are about to be used.

    Raises:
        ConfigError: If a file or folder is missing, or if classes do not fit.
    """
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        if loader is None:
            continue
        for key, dataset in _datasets(loader['dataset'], f'{split}_dataloader.dataset'):
            _check_files(key, dataset)
            classes = _classes(dataset, cfg.get('default_scope'))
            if classes is not None:
                _check_annotated_classes(key, dataset, classes)
                _check_num_classes(key, classes, cfg['model'])
        evaluators = cfg.get(f'{split}_evaluator') or []
        for evaluator in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
            if evaluator.get('ann_file') and not _exists(evaluator['ann_file']):
                raise ConfigError(
                    f'{split}_evaluator.ann_file: there is no {evaluator["ann_file"]}. It has to name the '
                    f'annotations of {split}_dataloader; --data-root DIR changes both.'
                )


def _datasets(dataset: dict, key: str) -> Iterator[tuple[str, dict]]:
    """The datasets within wrappers such as RepeatDataset or ConcatDataset."""
    if 'dataset' in dataset:
        yield from _datasets(dataset['dataset'], f'{key}.dataset')
    elif 'datasets' in dataset:
        for i, part in enumerate(dataset['datasets']):
            yield from _datasets(part, f'{key}.datasets.{i}')
    else:
        yield key, dataset


def _join(dataset: dict, path: str) -> str:
    root = dataset.get('data_root') or ''
    return path if '://' in path or not root else f'{root.rstrip("/")}/{path}' if not path.startswith('/') else path


def _exists(path: str) -> bool:
    return '://' in path or Path(path).exists()


def _check_files(key: str, dataset: dict) -> None:
    prefix = dataset.get('data_prefix') or {}
    prefixes = prefix if isinstance(prefix, dict) else {'': prefix}
    wanted = {f'data_prefix.{name}'.rstrip('.'): path for name, path in prefixes.items() if isinstance(path, str)}
    if dataset.get('ann_file'):
        wanted['ann_file'] = dataset['ann_file']
    for name, path in wanted.items():
        path = _join(dataset, path)
        if not _exists(path):
            raise ConfigError(
                f'{key}.{name}: there is no {path}. Put the data there, or a link to it (for COCO: '
                'ln -s /path/to/coco data/coco), name its place with --data-root DIR, or change '
                'data_root, ann_file and data_prefix in the config.'
            )


def _classes(dataset: dict, scope: str | None) -> tuple[str, ...] | None:
    classes = (dataset.get('metainfo') or {}).get('classes')
    if classes is None:
        with DATASETS.switch_scope_and_registry(scope) as registry:
            classes = getattr(registry.get(dataset['type']), 'METAINFO', {}).get('classes')
    return (classes,) if isinstance(classes, str) else None if classes is None else tuple(classes)


def _check_annotated_classes(key: str, dataset: dict, classes: tuple[str, ...]) -> None:
    path = _join(dataset, dataset.get('ann_file') or '')
    if not path.endswith('.json') or '://' in path:
        return
    annotated = _category_names(path)
    unknown = [name for name in classes if annotated is not None and name not in annotated]
    if unknown:
        raise ConfigError(
            f'{key}: {len(unknown)} of its {len(classes)} classes, {_some(unknown)}, are not among the categories of '
            f'{path}, which are {_some(annotated)}; their objects would silently be skipped. '
            f'Set {key}.metainfo.classes to these names.'
        )


def _category_names(path: str) -> list[str] | None:
    """Names in the "categories" of a COCO file, without parsing the half gigabyte around them; None if it has none."""
    with open(path, 'rb') as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        at = text.rfind(b'"categories"')
        start = text.find(b'[', at)
        if at < 0 or start < 0:
            return None
        # A list of dicts without lists in them, unless keypoints are annotated: try ever later closing brackets.
        end = start
        while (end := text.find(b']', end + 1)) >= 0:
            try:
                return [category['name'] for category in json.loads(text[start : end + 1])]
            except json.JSONDecodeError:
                continue
    return None


def _check_num_classes(key: str, classes: tuple[str, ...], model: dict) -> None:
    for name, head in _heads(model, 'model'):
        if head['num_classes'] != len(classes):
            raise ConfigError(
                f'{name}.num_classes={head["num_classes"]}, but {key} has {len(classes)} classes ({_some(classes)}): '
                f'set {name}.num_classes={len(classes)} or correct {key}.metainfo.classes.'
            )


def _heads(value: Any, key: str) -> Iterator[tuple[str, dict]]:
    if isinstance(value, dict):
        if key.rstrip('.0123456789').rsplit('.', 1)[-1] in CLASSIFYING and 'num_classes' in value:
            yield key, value
        for name, item in value.items():
            yield from _heads(item, f'{key}.{name}')
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _heads(item, f'{key}.{i}')


def _some(names: Sequence[str], limit: int = 6) -> str:
    return ', '.join(map(repr, names[:limit])) + (', …' if len(names) > limit else '')
