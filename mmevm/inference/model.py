"""Class names and deploy mode of a trained model, whatever its task."""

import copy
import json
from logging import WARNING
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from torch import nn

from mmevm.checks.model import heads
from mmevm.deployment import deploy
from mmevm.errors import ConfigError


def dataset_meta(content: Any, cfg: Config, model: nn.Module, checkpoint: str) -> dict[str, Any]:
    """Return the metainfo of the dataset, with ``classes`` (None if there are none) from the checkpoint or the config.

    The palette is the config's, as in DetInferencer.
    """
    meta = content.get('meta') or {}
    saved = meta.get('dataset_meta') or dict(classes=meta.get('CLASSES'))  # MMDetection 2 and MMClassification
    saved = {key.lower(): value for key, value in saved.items()}
    dataset = cfg.test_dataloader.dataset
    try:
        configured = DATASETS.build(dict(copy.deepcopy(dataset), lazy_init=True)).metainfo
    except (OSError, TypeError) as error:  # one that reads its classes from files, or takes no lazy_init
        configured, reason = {}, f' ({type(error).__name__}: {error})'
    else:
        reason = ''
    meta = saved | ({'palette': configured['palette']} if configured.get('palette') else {})
    if _is_names(saved.get('classes')):
        return meta
    counts = class_counts(model)
    classes = configured.get('classes')
    if _is_names(classes) and (not counts or len(classes) in counts):
        return meta | dict(classes=classes)
    found = f'has {len(classes)}' if _is_names(classes) else f'has none{reason}'
    expected = ' or '.join(map(str, sorted(counts))) or 'one for each label'
    print_log(
        f'Labels are shown as numbers: {checkpoint} has no class names in meta.dataset_meta, and '
        f'test_dataloader.dataset of the config {found}; expected: {expected}. Set '
        'test_dataloader.dataset.metainfo=dict(classes=(…)) in the config.',
        'current',
        WARNING,
    )
    return meta | dict(classes=None)


def describe_classes(content: Any, cfg: Config, model: nn.Module, checkpoint: str) -> dict[str, str]:
    """Return names and colors of the classes of a model, as metadata of an exported file.

    Returns:
        ``classes`` and ``palette``, a list of RGB colors, in JSON; nothing if there are no class names.
    """
    meta = dataset_meta(content, cfg, model, checkpoint) if cfg.get('test_dataloader') else {}
    classes = meta.get('classes')
    if not classes:
        return {}
    palette: Any = meta.get('palette')
    if not is_palette(palette, len(classes)):
        # as MMDetection's for palette='random'
        palette = np.random.RandomState(42).randint(0, 256, (len(classes), 3)).tolist()
    return {'classes': json.dumps(list(classes)), 'palette': json.dumps(list(palette)[: len(classes)])}


def is_palette(palette: Any, count: int) -> bool:
    """Return whether a palette has a color for each of the classes."""
    return isinstance(palette, (list, tuple)) and len(palette) >= count > 0


def _is_names(classes: Any) -> bool:
    return isinstance(classes, (list, tuple)) and bool(classes) and all(isinstance(name, str) for name in classes)


def class_counts(model: nn.Module) -> set[int]:
    """Return the numbers of classes of a model's heads: one, as a rule."""
    counts = (getattr(head, 'num_classes', None) for _, head in heads(model))
    return {count for count in counts if isinstance(count, int)}


def switch_to_deploy(model: nn.Module) -> None:
    """Fuse the layers of a model in place.

    Raises:
        ConfigError: If a part of it has no deploy mode.
    """
    try:
        deploy(model)
    except (TypeError, ValueError) as error:
        raise ConfigError(f'--deploy: {error} Leave it out to run the model as it was trained.') from error
