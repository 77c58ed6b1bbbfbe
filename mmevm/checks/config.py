"""Find likely mistakes in a config before anything is built."""

import difflib
import inspect
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner import Runner

from mmevm.errors import ConfigError

# Top-level keys of MMEngine, MMDetection and MMPretrain. Configs may have others.
_KNOWN_KEYS = {
    *inspect.signature(Runner).parameters,
    *('auto_scale_lr', 'custom_imports', 'data_preprocessor', 'data_root', 'env_cfg', 'find_unused_parameters'),
    *('model_wrapper_cfg', 'tta_model', 'tta_pipeline'),
} - {'cfg'}
# All published EfficientViM weights were trained with ImageNet's RGB statistics.
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def check_config(cfg: Config, splits: Sequence[str]) -> list[str]:
    """Look for likely mistakes in a config.

    Args:
        cfg: A config for MMEngine's runner.
        splits: The splits in use, out of 'train', 'val' and 'test'.

    Returns:
        Warnings, one line each.
    """
    warnings: list[str] = []
    for check in (_misspelled_keys, _string_classes, _evaluators, _pretrained_weights):
        with skip_failures():
            warnings += check(cfg, splits)
    return warnings


@contextmanager
def skip_failures() -> Iterator[None]:
    """Skip a check that fails itself, because it does not fit an unusual config, dataset or model."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        print_log(f'A check was skipped: {type(error).__name__}: {error}', 'current', logging.DEBUG)


def iter_dicts(value: Any, key: str = '') -> Iterator[tuple[str, dict]]:
    """Yield all dicts in a config value, outermost first, with their dotted keys."""
    if isinstance(value, dict):
        yield key, value
    if isinstance(value, (dict, list, tuple)):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from iter_dicts(item, f'{key}.{name}' if key else str(name))


def iter_datasets(cfg: Config, split: str) -> Iterator[tuple[str, dict]]:
    """Yield the dataset configs of a split, without wrappers such as ``RepeatDataset``, with their dotted keys."""
    for key, part in iter_dicts(cfg.get(f'{split}_dataloader'), f'{split}_dataloader'):
        if re.search(r'\.datasets?(\.\d+)*$', key) and not {'dataset', 'datasets'} & part.keys():
            yield key, part


def type_name(cfg: dict) -> str:
    """Return the name of a config's type, without scope. The type is a string or, in Python configs, a class."""
    kind = cfg.get('type', '')
    return kind.rpartition('.')[2] if isinstance(kind, str) else getattr(kind, '__name__', '')


def closest(name: str, names: Sequence[str] | set[str], cutoff: float = 0.6) -> str | None:
    """Return the name that is most similar to a misspelled one, or None."""
    others = {other.lower(): other for other in sorted(names) if other != name}
    found = difflib.get_close_matches(name.lower(), others, n=1, cutoff=cutoff)
    return others[found[0]] if found else None


def preview(names: Iterable[Any], limit: int = 5) -> str:
    """Join the first few of many names."""
    names = [str(name) for name in names]
    return ', '.join(names[:limit]) + (', …' if len(names) > limit else '')


def _string_classes(cfg: Config, splits: Sequence[str]) -> Iterator[str]:
    for key, dataset in (item for split in splits for item in iter_datasets(cfg, split)):
        classes = (dataset.get('metainfo') or {}).get('classes')
        if isinstance(classes, str) and not os.path.isfile(classes):
            yield f'{key}.metainfo.classes={classes!r} is a string, not a tuple. For one class, write ({classes!r},).'


def _misspelled_keys(cfg: Config, splits: Sequence[str]) -> Iterator[str]:
    for key in cfg:
        if key in _KNOWN_KEYS or key.startswith('_'):
            continue
        # 'datasets' or 'base_lrs' may be the user's own, so a plural must be more similar
        swapped = next((known for known in _KNOWN_KEYS if sorted(known) == sorted(key)), None)
        if known := swapped or closest(key, _KNOWN_KEYS, cutoff=0.94 if key.endswith('s') else 0.9):
            yield f'{key} is not a key that MMEngine reads. If you mean {known}, rename it.'


def _evaluators(cfg: Config, splits: Sequence[str]) -> Iterator[str]:
    for split in splits:
        key = f'{split}_evaluator'
        metrics = [metric for _, metric in iter_dicts(cfg.get(key)) if 'type' in metric]
        if find_spec('faster_coco_eval') is None and 'FasterCocoMetric' in map(type_name, metrics):
            yield f'{key}: FasterCocoMetric computes nothing. Run pip install faster-coco-eval, or use CocoMetric.'
        datasets = [dataset for _, dataset in iter_datasets(cfg, split) if dataset.get('ann_file')]
        steps = [step for dataset in datasets for step in dataset.get('pipeline') or ()]
        packing = [step for step in steps if type_name(step) == 'PackDetInputs']
        if packing and not any('instances' in step.get('meta_keys', ()) for step in packing):
            for metric in metrics:
                if type_name(metric) == 'CocoMetric' and not metric.get('ann_file'):
                    yield (
                        f"{key}: CocoMetric has no ann_file, so it needs the samples' own annotations. Add 'instances' "
                        f'to meta_keys of PackDetInputs in the pipeline of {split}_dataloader.dataset, or set '
                        f'{key}.ann_file.'
                    )
        if len(metrics) == len(datasets) == 1 and type_name(metrics[0]).startswith(('Coco', 'LVIS')):
            path = metrics[0].get('ann_file')  # without one, CocoMetric converts the dataset
            file = os.path.join(datasets[0].get('data_root') or '', datasets[0]['ann_file'])
            if isinstance(path, str) and '://' not in path and os.path.abspath(path) != os.path.abspath(file):
                yield f'{key}.ann_file={path!r}, but {split}_dataloader.dataset reads {file!r}. Use the same file.'


def _pretrained_weights(cfg: Config, splits: Sequence[str]) -> Iterator[str]:
    model, backbone = cfg.model, cfg.model.get('backbone') or {}
    if type_name(backbone) != 'EfficientViM' or 'train' not in splits:
        return
    starts = [start for _, start in iter_dicts([model.get('init_cfg'), backbone.get('init_cfg')])]
    if backbone.get('norm_eval') and not starts and not cfg.get('load_from') and not cfg.get('resume'):
        yield (
            'model.backbone.norm_eval=True, but the backbone starts from random weights, without statistics for '
            'BatchNorm. Set model.backbone.norm_eval=False.'
        )
    # The user's own weights may expect any normalization, and a pipeline may normalize instead of the preprocessor.
    if not any('efficientvim' in str(start.get('checkpoint')).lower() for start in starts) or any(
        type_name(step) == 'Normalize' for _, step in iter_dicts(cfg.get('train_dataloader'))
    ):
        return
    key = 'model.data_preprocessor' if model.get('data_preprocessor') else 'data_preprocessor'
    preprocessor = model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    mean, std = preprocessor.get('mean'), preprocessor.get('std')
    is_rgb = preprocessor.get('bgr_to_rgb') or preprocessor.get('to_rgb')
    given = [*(mean or []), *(std or [])]
    if not is_rgb or len(given) != 6 or not np.allclose(given, [*_MEAN, *_STD], rtol=0, atol=2):
        yield (
            f'{key} gives {"RGB" if is_rgb else "BGR"} images with mean={mean} and std={std}, but the pretrained '
            f'weights expect RGB images. Set mean={list(_MEAN)}, std={list(_STD)} and bgr_to_rgb=True in {key}.'
        )
