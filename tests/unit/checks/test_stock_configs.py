"""Check all configs of MMDetection and MMPretrain with EfficientViM as their backbone: none may be refused.

The libraries build models and datasets. What they cannot build here is listed and skipped.
"""

import copy
import gc
import json
import logging
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from generated_data import Generator
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.utils import is_installed
from torch import nn
from torch.nn.modules.conv import _ConvNd

from mmevm.checks import check_config
from mmevm.checks.config import iter_datasets
from mmevm.checks.data import compare_class_order, summarize_all
from mmevm.checks.model import FeatureTracer, check_topk, compare_class_counts

ARCH = 'm1'
BACKBONE = dict(type='mmevm.EfficientViM', arch=ARCH)


def replace_backbone(model):
    """Replace the backbone of a model and of models in it. The neck may not fit, but nothing is run."""
    if isinstance(model, dict):
        for key, value in model.items():
            if key == 'backbone' and isinstance(value, dict) and 'type' in value:
                model[key] = dict(BACKBONE)
            else:
                replace_backbone(value)
    elif isinstance(model, (list, tuple)):
        for value in model:
            replace_backbone(value)


class Cached:
    """Build what several configs have in common once. Cache errors too."""

    def __init__(self, build):
        self.build = build
        self.results = {}

    def __call__(self, cfg):
        key = json.dumps(cfg, sort_keys=True, default=str)
        if key not in self.results:
            try:
                self.results[key] = self.build(cfg), None
            except Exception as error:
                self.results[key] = None, f'{type(error).__name__}: {" ".join(str(error).split())[:150]}'
        return self.results[key]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize('package', ['mmdet', 'mmpretrain'])
def test_no_stock_config_is_refused(package, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    # Weights are not used.
    for layer in (_ConvNd, nn.Linear, nn.Embedding):
        monkeypatch.setattr(layer, 'reset_parameters', lambda self: None)
    for name in ('normal_', 'uniform_'):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *args, **kwargs: self)
    # mmengine collects garbage for each dataset, which took half of the time with hundreds of models in memory.
    monkeypatch.setattr(gc, 'collect', lambda *args: 0)
    root = Path(find_spec(package).submodule_search_locations[0], '.mim/configs')
    generator = Generator(tmp_path)

    def build_dataset(cfg):
        local = generator.localize(cfg)
        if local is None:
            raise LookupError(f'no generated data of {cfg["type"]}')
        return DATASETS.build(local)

    def build_model(cfg):
        return MODELS.build(copy.deepcopy(cfg)).to('meta')  # without memory

    datasets, models = Cached(build_dataset), Cached(build_model)
    counts, lines = Counter(), []
    logging.disable(logging.WARNING)
    try:
        for path in sorted(root.rglob('*.py')):
            if '_base_' in path.parts:
                continue
            try:
                cfg = Config.fromfile(path)
            except Exception as error:
                counts['configs not read'] += 1
                lines.append(f'{path.relative_to(root)}: not read: {type(error).__name__}: {str(error)[:100]}')
                continue
            counts['configs'] += 1
            init_default_scope(cfg.get('default_scope', package))
            replace_backbone(cfg.get('model'))
            splits = [split for split in ('train', 'val', 'test') if cfg.get(f'{split}_dataloader')]
            warnings, errors, built = check_config(cfg, splits), [], {}
            for split in splits:
                for key, dataset in iter_datasets(cfg, split):
                    result, error = datasets(dataset)
                    counts['datasets' if result is not None else 'datasets not built'] += 1
                    if result is None:
                        errors.append(error)
                    else:
                        built[key] = result
            summaries = summarize_all(built)
            warnings += [*compare_class_order(summaries), *(line for summary in summaries for line in summary.warnings)]

            model, error = models(cfg.model) if 'type' in (cfg.get('model') or {}) else (None, None)
            if model is not None:
                counts['models'] += 1
                check_topk(cfg, model, ['val', 'test'])
                with FeatureTracer(model, cfg.model) as tracer:
                    assert not list(tracer.warnings())
                for key, dataset in built.items():
                    warnings += compare_class_counts(model, dataset, key)
            elif error:
                counts['models not built'] += 1
                errors.append(error)
            counts['configs with a warning'] += bool(warnings)
            for what, texts in (('not built by the library', errors), ('warning', warnings)):
                lines += [f'{path.relative_to(root)}: {what}: {text}' for text in dict.fromkeys(texts)]
    finally:
        logging.disable(logging.NOTSET)
    folder = Path('work_dirs/stock_configs')
    folder.mkdir(parents=True, exist_ok=True)
    distribution = 'onedl' if is_installed('onedl-mmengine') else 'openmmlab'
    (folder / f'{distribution}_{package}.txt').write_text('\n'.join([json.dumps(counts), *lines, '']))
    print(dict(counts))
    assert counts['configs'] > 300
    assert counts['models'] > 0.8 * counts['configs']
    assert counts['datasets'] > 0.8 * counts['datasets not built']
    assert counts['configs with a warning'] < 0.02 * counts['configs']
