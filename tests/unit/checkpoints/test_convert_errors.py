"""Incomplete and other checkpoints are not converted."""

import re

import pytest
import torch
from checkpoint_formats import authors_detector, authors_layout, detector_state, timm_state
from torch import nn

from mmevm.checkpoints import (
    CheckpointError,
    convert_checkpoint,
    load_pretrained,
)
from mmevm.models import EfficientViM

CLASSIFIER_NAMES = [
    'patch_embed.conv.0.norm.num_batches_tracked',
    'stages.0.blocks.1.mixer.A',
    'stages.1.downsample.conv.2.fc1.bias',
    'stages.2.blocks.0.alpha',
    'norm.3.bias',
    'weights',
    'heads.2.bias',
    'heads_dist.0.weight',
]


DETECTOR_NAMES = [
    'backbone.stages.2.blocks.1.norm.bias',
    'neck.lateral_convs.1.conv.bias',
    'neck.batch_norm.0.weight',
    'neck.extra_trans_convs.0.conv.bias',
    'neck.extra_fpn_convs.0.conv.weight',
    'neck.fpn_convs.3.conv.weight',
    'bbox_head.retina_cls.weight',
    'bbox_head.cls_convs.2.conv.bias',
]


@pytest.mark.parametrize('change', ['missing', 'shape', 'kind'])
@pytest.mark.parametrize('name', [*CLASSIFIER_NAMES, *DETECTOR_NAMES])
def test_missing_or_misshapen_tensor_is_an_error(name, change):
    is_classifier = name in CLASSIFIER_NAMES
    state = timm_state('efficientvim_m1_dist') if is_classifier else authors_detector('retinanet')['state_dict']
    state = authors_layout(state)
    convert_checkpoint({'state_dict': state})
    if change == 'missing':
        del state[name]
    else:
        state[name] = torch.ones(3, 5) if change == 'shape' else 'no tensor'
    with pytest.raises(CheckpointError, match='EfficientViM-M1') as error:
        convert_checkpoint({'state_dict': state})
    assert 'without converting' not in str(error.value)
    new = (
        name.replace('batch_norm', 'pre_norms').replace('extra_trans', 'upsample').replace('extra_fpn', 'upsample_fpn')
    )
    if name != 'neck.fpn_convs.3.conv.weight':  # without it the neck has fewer levels, and the bias is unknown
        count = len(detector_state('retinanet', 7) if not is_classifier else timm_state('efficientvim_m1_dist'))
        problem = (
            rf'1 of another shape \(\S*{new}: \(.*\) expected, \(3, 5\)'
            if change == 'shape'
            else rf'1 missing \(\S*{new}\)'
        )
        assert re.search(rf'of {count} tensors, {problem}[^;]*\. Nothing', str(error.value))


@pytest.mark.parametrize(
    'name',
    [
        'scales',
        'stages.0.blocks.2.alpha',
        'stages.3.blocks.0.alpha',
        'norm.4.bias',
        'neck.what.0.conv.bias',
        'mask_head.x',
    ],
)
def test_unknown_tensor_is_an_error(name):
    state = dict(authors_layout(timm_state('efficientvim_m1')))
    state[name] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r'1 unknown \(.*' + name.replace('.', r'\.')):
        convert_checkpoint(state)


@pytest.mark.parametrize(
    ('kind', 'name'),
    [
        ('mask-rcnn', 'roi_head.bbox_head.fc_cls.bias'),
        ('retinanet', 'bbox_head.retina_cls.bias'),
        ('retinanet', 'neck.lateral_convs.0.conv.bias'),
        ('classifier', 'head.heads.0.bias'),
    ],
)
def test_default_number_of_classes_is_that_of_coco_or_imagenet(kind, name):
    complete = convert_checkpoint(timm_state('efficientvim_m1'))[0]['state_dict']
    state = dict(complete if kind == 'classifier' else detector_state(kind, 80))
    del state[name]
    with pytest.raises(
        CheckpointError,
        match=rf'of {len(state) + 1} tensors, 1 missing \({name}\)\. .*without converting',
    ):
        convert_checkpoint({'state_dict': state})


def test_messages_name_at_most_four_tensors():
    four = {f'a{i}': torch.ones(1) for i in range(4)}
    with pytest.raises(CheckpointError, match=r'The tensors are named a0, a1, a2, a3, but .*patch_embed'):
        convert_checkpoint(four)
    with pytest.raises(CheckpointError, match=r'named a0, a1, a2, a3, …, but'):
        convert_checkpoint(four | {'a4': torch.ones(1)})
    with pytest.raises(CheckpointError, match='The file has no tensors, only epoch'):
        convert_checkpoint({'epoch': 1})
    with pytest.raises(CheckpointError, match='which has model'):
        convert_checkpoint({'model': four}, 'ema')
    with pytest.raises(CheckpointError, match='which has a single unnamed state dict'):
        convert_checkpoint(four, 'ema')


def test_tensor_under_two_names_is_an_error(tmp_path):
    state = dict(timm_state('efficientvim_m1'))
    state['backbone.stages.0.blocks.0.alpha'] = state['stages.0.blocks.0.alpha'] + 1
    torch.save(state, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'1 tensors .* twice.*backbone\.stages\.0\.blocks\.0\.alpha'):
        convert_checkpoint(state)
    with pytest.raises(CheckpointError, match='in the file twice'):
        load_pretrained(EfficientViM('m1'), str(tmp_path / 'x.pth'))


def test_other_networks_and_contents_are_refused():
    with pytest.raises(CheckpointError, match='Use a checkpoint of an EfficientViM'):
        convert_checkpoint(nn.Linear(2, 2).state_dict())
    with pytest.raises(CheckpointError, match='no tensors'):
        convert_checkpoint({'epoch': 3})
    with pytest.raises(CheckpointError, match='holds a list'):
        convert_checkpoint([1])
