"""One training step's gradients, of several processes against one: ``torchrun … tests/helpers/gradients.py FILE``.

FILE is JSON: for each case the largest difference of a gradient, relative to the largest gradient, between several
processes and one process with the whole batch (``joined``), the mean over the parts of the batch (``parts``) and the
first part alone (``first``).
"""

import hashlib
import json
import os
import sys
from copy import deepcopy
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample

from mmevm.cli import build_runner, read_config

CONFIGS = Path(__file__).parents[2] / 'configs'
DIGITS = CONFIGS / 'demo/efficientvim-m1_digits.py'
BATCH, SIZE = 8, 64
OBJECTS = [6, 4, 1, 2, 1, 1, 2, 1]

BACKBONE = dict(_delete_=True, type='mmevm.EfficientViM', arch='m1', norm_eval=True)
NECK = dict(_delete_=True, type='mmevm.UpsampleFPN', in_channels=[128, 192, 320], out_channels=64, num_outs=5)
HEAD = dict(in_channels=64, feat_channels=64)
DETECTORS = dict(
    atss=(
        'mmdet::atss/atss_r50_fpn_1x_coco.py',
        dict(backbone=BACKBONE, neck=dict(NECK, num_upsamples=1, add_extra_convs='on_output'), bbox_head=HEAD),
    ),
    retinanet=(
        f'{CONFIGS}/retinanet_evm_m1.py',
        dict(backbone=dict(frozen_stages=1, with_cp=True), neck=dict(out_channels=64), bbox_head=HEAD),
    ),
    mask_rcnn=(f'{CONFIGS}/demo/maskrcnn_evm_m1_shapes.py', dict(backbone=dict(norm_eval=True))),
)
CLASSIFIERS = dict(mesa=dict(norm_eval=True), distillation=dict(norm_eval=True), sync_bn=dict(norm_eval=False))


def build(case):
    torch.manual_seed(0)
    if case in DETECTORS:
        path, changes = DETECTORS[case]
        cfg = read_config(path)
        cfg.merge_from_dict(dict(model=dict(backbone=dict(init_cfg=None))))
        cfg.merge_from_dict(dict(model=deepcopy(changes)))
        init_default_scope('mmdet')
        return MODELS.build(cfg.model).train()
    cfg = Config.fromfile(DIGITS)
    cfg.model.backbone.update(CLASSIFIERS[case])
    cfg.model.head.distilled = case == 'distillation'
    cfg.model.train_cfg = None  # no mixtures, which are random
    init_default_scope('mmpretrain')
    model = MODELS.build(dict(cfg.model, data_preprocessor=dict(type='ClsDataPreprocessor'))).train()
    if case in ('mesa', 'distillation'):
        weight = torch.randn(3 * SIZE * SIZE, 10)
        model.teacher = lambda images: images.flatten(1) @ weight
    return model


def batch(case, part=0, parts=1):
    """Return images and their annotations. The first images have most of the objects."""
    torch.manual_seed(1)
    images = torch.randn(BATCH, 3, SIZE, SIZE)
    if case in CLASSIFIERS:
        samples = [DataSample().set_gt_label(i) for i in range(BATCH)]
    else:
        from mmdet.testing import demo_mm_inputs  # imports mmcv.ops, which needs mmevm to be imported first

        shapes = [(3, SIZE, SIZE)] * BATCH
        samples = demo_mm_inputs(BATCH, shapes, num_items=OBJECTS, num_classes=80, with_mask=True)['data_samples']
        for sample in samples:
            sample.gt_instances.labels.zero_()
            sample.set_metainfo(dict(pad_shape=(SIZE, SIZE), batch_input_shape=(SIZE, SIZE)))
    this_part = slice(part * BATCH // parts, (part + 1) * BATCH // parts)
    return images[this_part], samples[this_part]


def step(model, case, part=0, parts=1):
    """Return gradients by name, and the running statistics after the step."""
    inputs = batch(case, part, parts)
    torch.manual_seed(part)  # seeds the sampling of RoIs
    losses = model(*inputs, mode='loss')
    module = getattr(model, 'module', model)
    module.zero_grad()
    module.parse_losses(losses)[0].backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad}
    return gradients, {name: buffer.clone() for name, buffer in module.named_buffers() if 'running_' in name}


def difference(actual, expected, share=1e-6):
    """Return the largest difference, relative to the largest value of its tensor, or at least to ``share`` of all."""
    assert actual.keys() == expected.keys()
    scales = {name: tensor.abs().max() for name, tensor in expected.items()}
    least = share * max(scales.values())
    return max((actual[name] - expected[name]).abs().max() / max(scales[name], least) for name in expected).item()


def set_precision(case):
    torch.set_default_dtype(torch.float32 if case == 'sync_bn' else torch.float64)  # mmcv's has no float64


def references(case, count):
    """Return gradients of one process, before the processes are connected: mmdet's losses would wait for the others."""
    set_precision(case)
    model = build(case)
    joined, statistics = step(model, case)
    each = [step(model, case, part, count)[0] for part in range(count)]
    mean = {name: sum(part[name] for part in each) / count for name in joined}
    return dict(joined=joined, parts=mean, first=each[0]), statistics


def compare(runner, case, expected):
    set_precision(case)
    runner.cfg.sync_bn = 'mmcv' if case == 'sync_bn' else None
    model = runner.wrap_model(dict(runner.cfg.model_wrapper_cfg), build(case))
    gradients, statistics = step(model, case, get_rank(), get_world_size())
    sums = all_gather_object(checksums(gradients))
    result = dict(same=all(other == sums[0] for other in sums))
    if expected:
        # Before a BatchNorm many gradients are zero except for rounding in float32.
        share = 1 if case == 'sync_bn' else 1e-6
        result |= {name: difference(gradients, reference, share) for name, reference in expected[0].items()}
        result['statistics'] = difference(statistics, expected[1])
    return result


def checksums(tensors):
    return {name: hashlib.sha256(tensor.numpy()).hexdigest() for name, tensor in tensors.items()}


def main():
    path = Path(sys.argv[1])
    cfg = Config.fromfile(DIGITS)
    cfg.merge_from_dict(dict(launcher='pytorch', work_dir=str(path.parent), log_level='WARNING'))
    cases = [*CLASSIFIERS, *DETECTORS]
    is_first = os.environ['RANK'] == '0'
    expected = {case: references(case, int(os.environ['WORLD_SIZE'])) for case in cases if is_first}
    torch.set_default_dtype(torch.float32)  # as in the other processes
    runner = build_runner(cfg)
    results = {case: compare(runner, case, expected.get(case)) for case in cases}
    if is_first:
        path.write_text(json.dumps(results))


if __name__ == '__main__':
    main()
