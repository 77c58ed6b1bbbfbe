"""configs/bccd: detectors that are compared with each other, so they differ in backbone and neck alone."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

CONFIGS = Path(__file__).parents[2] / 'configs/bccd'
BASE = Config.fromfile(CONFIGS / 'rtmdet_evm_m1_bccd.py')
# What a config in settings/ changes.
SETTINGS = {
    'rtmdet_evm_m1_batch8_bccd': ('train_dataloader.batch_size', 8),
    'rtmdet_evm_m1_lr-2e-3_bccd': ('optim_wrapper.optimizer.lr', 2e-3),
    'rtmdet_evm_m1_lr-5e-4_bccd': ('optim_wrapper.optimizer.lr', 5e-4),
    'rtmdet_evm_m1_norm-eval_bccd': ('model.backbone.norm_eval', True),
}


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.py')), ids=lambda path: path.stem)
def test_only_backbone_and_neck_differ(path):
    cfg = Config.fromfile(path)
    model = cfg.pop('model')
    assert cfg.to_dict() == {key: value for key, value in BASE.to_dict().items() if key != 'model'}
    for key in model.keys() | BASE.model.keys():
        assert key in ('backbone', 'neck') or model[key] == BASE.model[key], key


@pytest.mark.parametrize('path', sorted(CONFIGS.glob('*.py')), ids=lambda path: path.stem)
def test_maps_have_the_strides_of_the_head(path):
    cfg = Config.fromfile(path)
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model).eval()
    with torch.no_grad():
        maps = model.extract_feat(torch.zeros(1, 3, 128, 192))
    assert [tuple(x.shape) for x in maps] == [(1, 96, 128 // stride, 192 // stride) for stride in (8, 16, 32)]


def test_settings_change_one_value():
    paths = {path.stem: path for path in (CONFIGS / 'settings').glob('*.py')}
    assert paths.keys() == SETTINGS.keys()
    for name, (key, value) in SETTINGS.items():
        expected = BASE.copy()
        expected.merge_from_dict({key: value})
        assert Config.fromfile(paths[name]).to_dict() == expected.to_dict(), name
