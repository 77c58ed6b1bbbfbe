"""Random checkpoints in the formats of the authors, timm and MMDetection."""

import argparse
import functools
import re
import sys
import types
from collections import OrderedDict
from pathlib import Path

import mmdet
import timm
import torch
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.config import Config
from mmengine.logging import HistoryBuffer


def random_weights(state: dict[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    """Randomize every tensor, so that each missing one changes the features."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, tensor in state.items():
        if name.endswith('num_batches_tracked'):
            result[name] = torch.randint(1, 1000, (), generator=generator)
        elif name.endswith('running_var'):
            result[name] = torch.rand(tensor.shape, generator=generator) + 0.5
        else:
            fan = tensor[0].numel() if tensor.dim() > 1 else 4
            result[name] = torch.randn(tensor.shape, generator=generator) * fan**-0.5
            result[name] += name.endswith('norm.weight')
    return result


@functools.lru_cache
def timm_state(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    return random_weights(timm.create_model(name, pretrained=False).state_dict(), seed)


def timm_features(name: str, state: dict[str, torch.Tensor], images: torch.Tensor) -> list[torch.Tensor]:
    model = timm.create_model(name, pretrained=False).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return model.forward_intermediates(images, intermediates_only=True)


def authors_layout(state: dict[str, torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
    """Reshape LayerNorms to (1, C, 1), and that of the last map to (1, C, 1, 1)."""
    result = OrderedDict()
    for name, tensor in state.items():
        parts = name.removeprefix('backbone.').split('.')
        if parts[0] == 'norm' or (parts[0] == 'stages' and parts[2] == 'blocks' and parts[4] == 'norm'):
            tensor = tensor.reshape((1, -1, 1, 1) if parts[:2] == ['norm', '3'] else (1, -1, 1))
        result[name] = tensor
    return result


def authors_file(path: Path, name: str = 'efficientvim_m1', prefix: str = '', **save) -> Path:
    """Save EMA weights of seed 1, other weights of seed 0, and objects of classes that cannot be imported."""
    module = types.ModuleType('gone')
    node = type('CfgNode', (dict,), {'__module__': 'gone'})
    module.CfgNode = node
    config = node(MODEL=node(TYPE='efficientvim'), AMP=True)
    config.frozen = True
    states = [authors_layout(timm_state(name, seed)) for seed in (0, 1)]
    plain, ema = (OrderedDict((prefix + key, tensor) for key, tensor in state.items()) for state in states)
    sys.modules['gone'] = module
    try:
        torch.save(
            {
                'model': plain,
                'model_ema': ema,
                'optimizer': {'state': {0: {'exp_avg': torch.ones(2)}}, 'param_groups': [{'lr': 1e-3}]},
                'epoch': 449,
                'config': config,
                'args': argparse.Namespace(batch_size=2048, node=node()),
            },
            path,
            **save,
        )
    finally:
        del sys.modules['gone']
    return path


@functools.lru_cache
def detector_state(kind: str, num_classes: int) -> dict[str, torch.Tensor]:
    """State dict of a detector of MMDetection with the backbone and the neck of mmevm."""
    model = Config.fromfile(Path(mmdet.__file__).parent / f'.mim/configs/_base_/models/{kind}_r50_fpn.py').model
    model.backbone = dict(type='mmevm.EfficientViM', arch='m1')
    neck = dict(num_upsamples=1, add_extra_convs='on_input') if kind == 'retinanet' else dict(num_upsamples=2)
    model.neck = dict(type='mmevm.UpsampleFPN', in_channels=[128, 192, 320], out_channels=256, num_outs=5, **neck)
    for head in [model.bbox_head] if kind == 'retinanet' else [model.roi_head.bbox_head, model.roi_head.mask_head]:
        head.num_classes = num_classes
    return random_weights(MMDET_MODELS.build(dict(model, _scope_='mmdet')).state_dict())


def authors_detector(kind: str, num_classes: int = 7) -> dict:
    state = OrderedDict()
    for name, tensor in authors_layout(detector_state(kind, num_classes)).items():
        if name.startswith('neck.pre_norms.'):
            tensor = tensor.reshape(1, -1, 1, 1)
        name = name.replace('neck.pre_norms.', 'neck.batch_norm.')
        name = name.replace('neck.upsample_convs.', 'neck.extra_trans_convs.')
        if match := re.fullmatch(r'neck\.upsample_fpn_convs\.(\d)(.*)', name):  # counted from the finest level
            upsamples = 1 if kind == 'retinanet' else 2
            name = f'neck.extra_fpn_convs.{upsamples - 1 - int(match[1])}{match[2]}'
        state[name] = tensor
    meta = {'mmdet_version': '2.25.0', 'CLASSES': ('cat', 'dog'), 'PALETTE': [HistoryBuffer()]}
    return {'meta': meta, 'state_dict': state, 'optimizer': {'state': {}}}


def head_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(('patch', 'stages'))}


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name
