"""Likely mistakes that can be seen in a config before anything is built."""

import difflib
import inspect
import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

from mmevm.errors import ConfigError

# Top-level keys of MMEngine, MMDetection and MMPretrain; configs may have any others.
_KNOWN_KEYS = {
    *inspect.signature(Runner).parameters,
    *('auto_scale_lr', 'custom_imports', 'data_preprocessor', 'data_root', 'env_cfg', 'find_unused_parameters'),
    *('model_wrapper_cfg', 'tta_model', 'tta_pipeline'),
} - {'cfg'}
# ImageNet's statistics of RGB images, with which all published EfficientViM weights were trained.
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def check_config(cfg: Config, splits: Sequence[str]) -> list[str]:
    """Look for likely mistakes in a config.

    Args:
        cfg: A config of MMEngine's runner.
        splits: The splits that will be used, out of 'train', 'val' and 'test'.

    Returns:
        Warnings, one line each.

    Raises:
        ConfigError: If a value cannot work.
    """
    for key, value in (cfg.get('model') or {}).items():
        if isinstance(value, tuple) and len(value) == 1 and isinstance(value[0], dict):
            raise ConfigError(f'model.{key} is a tuple. Remove the comma after its closing parenthesis.')
    for split in splits:
        for name in ('batch_size', 'num_workers'):
            value = (cfg.get(f'{split}_dataloader') or {}).get(name, 0)
            if isinstance(value, str):
                raise ConfigError(
                    f'{split}_dataloader.{name}={value!r} is a {type(value).__name__}, but must be an integer. Set '
                    f'{split}_dataloader.{name} to a number without quotes.'
                )
    warnings = [*_misspelled_keys(cfg), *string_classes(cfg, splits), *_evaluators(cfg, splits)]
    return warnings + (_pretrained_weights(cfg) if 'train' in splits else [])


def iter_dicts(value: Any, key: str = '') -> Iterator[tuple[str, dict]]:
    """Yield all dicts within a config value, outermost first, with their dotted keys."""
    if isinstance(value, dict):
        yield key, value
    if isinstance(value, (dict, list, tuple)):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from iter_dicts(item, f'{key}.{name}' if key else str(name))


def iter_datasets(value: Any, key: str) -> Iterator[tuple[str, dict]]:
    """Yield the configs of the data sets within wrappers such as ``RepeatDataset`` and ``ConcatDataset``."""
    if isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from iter_datasets(item, f'{key}.{i}')
    elif isinstance(value, dict):
        inner = next((name for name in ('dataset', 'datasets') if name in value), None)
        if inner is None:
            yield key, value
        else:
            yield from iter_datasets(value[inner], f'{key}.{inner}')


def datasets_of(cfg: Config, split: str) -> Iterator[tuple[str, dict]]:
    """Yield the configs of a split's data sets, with their keys."""
    yield from iter_datasets((cfg.get(f'{split}_dataloader') or {}).get('dataset'), f'{split}_dataloader.dataset')


def type_name(cfg: dict) -> str:
    """Return the name of a config's type, without its scope. The type is a string or, in Python configs, a class."""
    kind = cfg.get('type', '')
    return kind.rpartition('.')[2] if isinstance(kind, str) else getattr(kind, '__name__', '')


def closest(name: str, names: Sequence[str] | set[str], cutoff: float = 0.6) -> str | None:
    """Return the name most similar to a misspelled one, or None."""
    others = {other.lower(): other for other in sorted(names) if other != name}
    found = difflib.get_close_matches(name.lower(), others, n=1, cutoff=cutoff)
    return others[found[0]] if found else None


def _misspelled_keys(cfg: Config) -> Iterator[str]:
    for key in cfg:
        if key in _KNOWN_KEYS or key.startswith('_'):
            continue
        swapped = next((known for known in _KNOWN_KEYS if sorted(known) == sorted(key)), None)
        if known := swapped or closest(key, _KNOWN_KEYS, cutoff=0.94 if key.endswith('s') else 0.9):
            yield f'{key} is not a key that MMEngine reads. If {known} is meant, rename it.'


def string_classes(cfg: Config, splits: Sequence[str]) -> Iterator[str]:
    """Warn about classes that are one string."""
    for split in splits:
        for key, dataset in datasets_of(cfg, split):
            classes = (dataset.get('metainfo') or {}).get('classes')
            if isinstance(classes, str) and not os.path.isfile(classes):
                yield (
                    f'{key}.metainfo.classes={classes!r} is a string, neither a file nor a tuple of names. Write '
                    f'classes=({classes!r},), with a comma, for one class.'
                )


def _evaluators(cfg: Config, splits: Sequence[str]) -> Iterator[str]:
    for split in splits:
        metrics = {type_name(metric) for _, metric in iter_dicts(cfg.get(f'{split}_evaluator'))}
        if 'FasterCocoMetric' in metrics and find_spec('faster_coco_eval') is None:
            yield (
                f'{split}_evaluator is a FasterCocoMetric, which computes nothing without faster-coco-eval. '
                'Run pip install faster-coco-eval, or use CocoMetric.'
            )
        datasets = [dataset for _, dataset in datasets_of(cfg, split) if dataset.get('ann_file')]
        files = [_join(dataset.get('data_root'), dataset['ann_file']) for dataset in datasets]
        evaluator = cfg.get(f'{split}_evaluator')  # of several, each may have a file of its own
        if isinstance(evaluator, dict) and type_name(evaluator).startswith(('Coco', 'LVIS')) and len(files) == 1:
            path = evaluator.get('ann_file')
            if isinstance(path, str) and os.path.abspath(path) != os.path.abspath(files[0]):
                yield (
                    f'{split}_evaluator.ann_file={path!r} is not that of {split}_dataloader.dataset, {files[0]!r}. '
                    'Image ids that are missing in one of them stop the evaluation or lower its result.'
                )


def _join(root: str | None, path: str) -> str:
    return path if '://' in path else os.path.join(root or '', path)


def _pretrained_weights(cfg: Config) -> list[str]:
    model = cfg.get('model') or {}
    backbone = model.get('backbone') or {}
    if type_name(backbone) != 'EfficientViM':
        return []
    starts = [start for _, start in iter_dicts([model.get('init_cfg'), backbone.get('init_cfg')])]
    if not starts and not cfg.get('load_from') and not cfg.get('resume'):
        if backbone.get('norm_eval'):
            return [
                'model.backbone.norm_eval=True, but the backbone starts from random weights: BatchNorm would keep its '
                'initial statistics, and the model hardly learn. Set model.backbone.norm_eval=False.'
            ]
        return []
    if not any('efficientvim' in str(start.get('checkpoint')).lower() for start in starts):
        return []  # weights of the user's own, which may be of any normalization
    key = 'data_preprocessor' if not model.get('data_preprocessor') else 'model.data_preprocessor'
    preprocessor = model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    if backbone.get('in_channels', 3) != 3 or any(
        type_name(step) == 'Normalize' for _, step in iter_dicts(cfg.get('train_dataloader'))
    ):
        return []
    mean, std = preprocessor.get('mean'), preprocessor.get('std')
    bgr = not (preprocessor.get('bgr_to_rgb') or preprocessor.get('to_rgb'))
    if (
        mean is not None
        and std is not None
        and not bgr
        and all(abs(a - b) < 2 for a, b in zip([*mean, *std], [*_MEAN, *_STD], strict=False))
    ):
        return []
    order = 'BGR' if bgr else 'RGB'
    return [
        f'{key} gives {order} images normalized with mean={mean}, std={std}, but the pretrained weights expect RGB '
        f'images with mean={list(_MEAN)}, std={list(_STD)}. Set these and bgr_to_rgb=True in {key}.'
    ]
