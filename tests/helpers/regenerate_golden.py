"""Compare outputs with those recorded in tests/golden, or record them again.

The records detect changes of numbers by a new version of a dependency or by a change of mmevm. They do not tell whether
a number is right: other tests compare with independent references.

``python tests/helpers/regenerate_golden.py`` prints what differs from the records, and exits with 1 if anything does.
``--write --reason '…'`` records the differing cases again, with the reason.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import mmevm  # noqa: F401 - registers the fallback operators before mmcv.ops is imported

# isort: split
import mmcv.ops
import numpy as np
import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
from torch import Tensor, nn

from mmevm.analysis import build_without_weights
from mmevm.analysis.latency import environment
from mmevm.cli import read_config
from mmevm.deployment import deploy
from mmevm.models import EfficientViM, FusionClsHead, UpsampleFPN
from mmevm.models.layers import ConvNorm, LayerNorm2d

FOLDER = Path(__file__).parents[1] / 'golden'
CONFIGS = Path(__file__).parents[2] / 'configs'

# Accepted difference from a record, relative to the largest value of its tensor. Another processor, thread count or
# convolution algorithm sums in another order, which changes float32 by up to 3e-5 at the end of a network. Another
# constant, border or order of channels changes it by 1e-3 or more.
TOLERANCE = 1e-4
SAMPLES = 12

Outputs = Mapping[str, Tensor]


class Numbers:
    """Random numbers of NumPy's legacy generator, which is guaranteed to stay the same; torch's are not."""

    def __init__(self, seed: int) -> None:
        self.stream = np.random.RandomState(seed)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return torch.from_numpy(self.stream.uniform(low, high, shape)).float()

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.from_numpy(self.stream.randint(0, high, shape).astype(np.int64))


@torch.no_grad()
def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Set every parameter and statistic to a value that does not depend on the initialization of the layer."""
    numbers = Numbers(seed)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point():
            continue
        if name.endswith('running_var') or (tensor.ndim == 1 and name.endswith('.weight')):
            low, high = 0.5, 1.5
        elif name.endswith('alpha'):  # gates from 0.1 to 0.9
            low, high = -2.2, 2.2
        elif tensor.ndim > 1:  # outputs about as large as inputs
            high = (3 / tensor[0].numel()) ** 0.5
            low = -high
        else:
            low, high = -0.3, 0.3
        tensor.copy_(numbers.uniform(low, high, *tensor.shape))
    return model


def images() -> Tensor:
    """Return two images of 80×112 pixels, whose maps have 5×7, 3×4 and 2×2 pixels."""
    return Numbers(1).uniform(-2, 2, 2, 3, 80, 112)


def pyramid(channels: tuple[int, ...]) -> tuple[Tensor, ...]:
    numbers = Numbers(2)
    sizes = ((5, 7), (3, 4), (2, 2))
    return tuple(numbers.uniform(-1, 1, 2, c, *size) for c, size in zip(channels, sizes, strict=True))


def named(prefix: str, tensors: Any) -> dict[str, Tensor]:
    """Return the tensors of nested lists by their positions."""
    if isinstance(tensors, Tensor):
        return {prefix: tensors}
    return {name: x for i, item in enumerate(tensors) for name, x in named(f'{prefix}.{i}', item).items()}


def layers() -> Outputs:
    """Variances close to the eps of the norms."""
    x = Numbers(3).uniform(-0.01, 0.01, 2, 8, 5, 6)
    norm = fill(LayerNorm2d(8))
    conv = fill(ConvNorm(8, 4, 3, stride=2, norm_cfg=dict(type='BN'), relu=True)).eval()
    conv.norm.running_var.mul_(1e-4)
    return dict(channel_layer_norm=norm(x), conv_norm=conv(x))


def backbone(arch: str, deployed: bool = False) -> Outputs:
    model = fill(EfficientViM(arch, out_hidden_states=True)).eval()
    if deployed:
        model = deploy(model)
    return named('out', model(images()))


def training(arch: str) -> Outputs:
    """Batch statistics and gradients, in float64: in float32, rounding would decide the gradient of ReLU near 0."""
    model = fill(EfficientViM(arch)).double().train()
    with torch.enable_grad():
        maps = model(images().double())
        sum((x**2).mean() for x in maps).backward()
    tensors = dict(model.state_dict(keep_vars=True))
    gradients = {
        f'grad of {name}': tensors[name].grad
        for name in (
            *('patch_embed.conv.0.conv.weight', 'stages.0.blocks.0.alpha', 'stages.0.blocks.1.mixer.D'),
            *('stages.1.blocks.0.mixer.BCdt_proj.conv.weight', 'stages.1.downsample.conv.2.fc1.bias'),
            *('stages.2.blocks.1.ffn.fc1.norm.weight', 'stages.2.blocks.0.norm.weight'),
        )
    }
    statistics = {name: tensors[name] for name in tensors if name.endswith('0.dwconv1.norm.running_var')}
    return named('out', maps) | gradients | statistics


def neck(**arguments: Any) -> Outputs:
    channels = (24, 40, 64)
    model = fill(UpsampleFPN(list(channels), out_channels=16, num_outs=5, **arguments)).eval()
    return named('level', model(pyramid(channels)))


def fusion_head() -> Outputs:
    channels = (24, 40, 64)
    logits = {}
    for distilled in (False, True):
        head = fill(FusionClsHead(7, channels, distilled=distilled)).eval()
        logits['distilled' if distilled else 'plain'] = head(pyramid(channels))
    return logits


def retinanet() -> Outputs:
    cfg = read_config(str(CONFIGS / 'retinanet_evm_m1.py'))
    cfg.merge_from_dict({'model.neck.out_channels': 16})
    cfg.merge_from_dict({f'model.bbox_head.{key}': 16 for key in ('in_channels', 'feat_channels')})
    model = fill(build_without_weights(cfg)).eval()
    scores, boxes = model.bbox_head(model.extract_feat(images()))
    return named('scores', scores) | named('boxes', boxes)


def mask_rcnn() -> Outputs:
    """Outputs of the RPN, and of the other heads for fixed RoIs: proposals could change by rounding."""
    cfg = read_config(str(CONFIGS / 'demo/maskrcnn_evm_m1_shapes.py'))
    model = fill(build_without_weights(cfg)).eval()
    maps = model.extract_feat(images())
    scores, boxes = model.rpn_head(maps)
    rois = torch.tensor([[0, 2.5, 3.5, 40, 30.5], [0, 10, 5, 111, 79], [1, 60.2, 20.8, 90.1, 77.7]])
    heads = model.roi_head
    of_boxes = heads.bbox_head(heads.bbox_roi_extractor(maps[:4], rois))
    of_masks = heads.mask_head(heads.mask_roi_extractor(maps[:4], rois))
    return named('rpn.scores', scores) | named('rpn.boxes', boxes) | named('box', of_boxes) | named('mask', of_masks)


def boxes_and_scores() -> tuple[Tensor, Tensor, Tensor]:
    numbers = Numbers(4)
    corners, sizes = numbers.uniform(0, 60, 24, 2), numbers.uniform(10, 40, 24, 2)
    return torch.cat([corners, corners + sizes], dim=1), numbers.uniform(0, 1, 24), numbers.integers(3, 24)


def nms() -> Outputs:
    boxes, scores, labels = boxes_and_scores()
    small = boxes / 8  # small boxes, so that offset=1 matters
    detections = {
        'nms': mmcv.ops.nms(boxes, scores, 0.4),
        'nms, offset 1': mmcv.ops.nms(small, scores, 0.4, offset=1),
        'batched_nms': mmcv.ops.batched_nms(boxes, scores, labels, dict(type='nms', iou_threshold=0.4)),
    }
    for method in ('naive', 'linear', 'gaussian'):
        detections[f'soft_nms, {method}'] = mmcv.ops.soft_nms(boxes, scores, method=method)
    outputs = {}
    for name, (found, kept) in detections.items():
        outputs |= {f'{name}: boxes': found[:, :4], f'{name}: scores': found[:, 4], f'{name}: kept': kept}
    groups = mmcv.ops.nms_match(torch.cat([boxes, scores[:, None]], dim=1), 0.4)
    return outputs | {
        'nms_match': torch.cat(list(groups)),
        'nms_match: sizes': torch.tensor([len(group) for group in groups]),
        'bbox_overlaps': mmcv.ops.bbox_overlaps(boxes[:6], boxes[6:]),
        'bbox_overlaps, offset 1': mmcv.ops.bbox_overlaps(small[:6], small[6:], offset=1),
    }


def roi_ops() -> Outputs:
    maps, offset = Numbers(5).uniform(-1, 1, 2, 4, 16, 20), Numbers(6).uniform(-1, 1, 3, 2, 3, 2)
    rois = torch.tensor([[0, 2.3, 3.1, 17.6, 13.2], [1, -4.2, -3.3, 9.1, 22.7], [1, 5.2, 5.1, 34.3, 29.4]])
    return {
        'roi_align': mmcv.ops.roi_align(maps, rois, (3, 2), 0.5, 0, 'avg', True),
        'roi_align, 2 samples': mmcv.ops.roi_align(maps, rois, (3, 2), 0.5, 2, 'avg', True),
        'roi_align, not aligned': mmcv.ops.roi_align(maps, rois, (3, 2), 0.5, 0, 'avg', False),
        'roi_align, largest': mmcv.ops.roi_align(maps, rois, (3, 2), 0.5, 2, 'max', True),
        'roi_pool': mmcv.ops.roi_pool(maps, rois, (3, 2), 0.5),
        'deform_roi_pool': mmcv.ops.deform_roi_pool(maps, rois, offset, (3, 2), 0.5, 2, 0.3),
    }


def convolutions() -> Outputs:
    numbers = Numbers(7)
    maps, weight, bias = (
        numbers.uniform(-1, 1, 2, 4, 7, 6),
        numbers.uniform(-1, 1, 6, 2, 3, 2),
        numbers.uniform(-1, 1, 6),
    )
    offset, mask = numbers.uniform(-1.5, 1.5, 2, 24, 3, 6), numbers.uniform(0, 1, 2, 12, 3, 6)
    geometry = ((2, 1), (0, 1), (1, 2), 2, 2)  # stride, padding, dilation, groups and groups of offsets
    masked = fill(mmcv.ops.MaskedConv2d(4, 6, 3, padding=1)).eval()
    features, taps = numbers.uniform(-1, 1, 1, 4, 5, 6), numbers.uniform(0, 1, 1, 18, 10, 12)
    shapes, starts = torch.tensor([[6, 5], [3, 4]]), torch.tensor([0, 30])
    value, places = numbers.uniform(-1, 1, 2, 42, 2, 3), numbers.uniform(-0.2, 1.2, 2, 5, 2, 2, 4, 2)
    return {
        'deform_conv2d': mmcv.ops.deform_conv2d(maps, offset, weight, *geometry),
        'modulated_deform_conv2d': mmcv.ops.modulated_deform_conv2d(maps, offset, mask, weight, bias, *geometry),
        'masked_conv2d': masked(maps[:1], (maps[:1, 0] > 0).float()),
        'carafe': mmcv.ops.carafe(features, taps, 3, 2, 2),
        'ms_deform_attn': MultiScaleDeformableAttnFunction.apply(
            value, shapes, starts, places, numbers.uniform(0, 1, 2, 5, 2, 2, 4), 64
        ),
    }


def focal_losses() -> Outputs:
    numbers = Numbers(8)
    logits, labels = numbers.uniform(-4, 4, 10, 5), numbers.integers(5, 10)
    outputs = {}
    for name in ('sigmoid_focal_loss', 'softmax_focal_loss'):
        loss = getattr(mmcv.ops, name)
        outputs[name] = loss(logits, labels, 2.0, 0.25, None, 'none')
        with torch.enable_grad():
            given = logits.clone().requires_grad_()
            loss(given, labels, 2.0, 0.25, None, 'sum').backward()
        outputs[f'{name}, gradient'] = given.grad
    return outputs


CASES: dict[str, Callable[[], Outputs]] = {
    'layers': layers,
    **{f'backbone_{arch}': partial(backbone, arch) for arch in EfficientViM.arch_settings},
    **{f'deployed_{arch}': partial(backbone, arch, deployed=True) for arch in EfficientViM.arch_settings},
    'training_m1': partial(training, 'm1'),
    'neck_finer': neck,
    'neck_coarser': partial(neck, num_upsamples=1, add_extra_convs='on_input'),
    'fusion_head': fusion_head,
    'retinanet': retinanet,
    'mask_rcnn': mask_rcnn,
    'nms': nms,
    'roi_ops': roi_ops,
    'convolutions': convolutions,
    'focal_losses': focal_losses,
}


@torch.no_grad()
def compute(case: str) -> dict[str, Any]:
    """Return the record of a case: for each output its shape, statistics of all values, and some values."""
    return {name: summarize(x) for name, x in CASES[case]().items()}


def summarize(x: Tensor) -> dict[str, Any]:
    """Return the shape of a tensor, statistics of all values, and some values."""
    flat = x.detach().double().flatten()
    at = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat))).round().long() if len(flat) else []
    # The mean with random signs differs if the same values are at other positions.
    signs = torch.from_numpy(np.random.RandomState(9).choice([-1.0, 1.0], len(flat)))
    figures = dict(
        largest=flat.abs().max(), mean=flat.mean(), rms=flat.square().mean().sqrt(), mixed=(signs * flat).mean()
    )
    return dict(
        shape=list(x.shape),
        **{name: float(f'{figure:.7g}') for name, figure in figures.items()},
        values=[float(f'{value:.7g}') for value in flat[at].tolist()],
    )


def find_mismatches(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """Describe each output that differs from its record."""
    for name in [*recorded, *(name for name in found if name not in recorded)]:
        if name not in found or name not in recorded:
            yield f'{name}: {"no longer there" if name in recorded else "not recorded"}'
            continue
        old, new = recorded[name], found[name]
        if old['shape'] != new['shape']:
            yield f'{name}: shape {new["shape"]}, recorded {old["shape"]}'
            continue
        scale = max(old['largest'], np.finfo(np.float32).tiny)
        pairs = [(key, old[key], new[key]) for key in ('largest', 'mean', 'rms', 'mixed')]
        pairs += [(f'value {i}', a, b) for i, (a, b) in enumerate(zip(old['values'], new['values'], strict=True))]
        key, a, b = max(pairs, key=lambda pair: -1 if pair[1] == pair[2] else abs(pair[1] - pair[2]))
        if not abs(a - b) <= TOLERANCE * scale:  # also if it is NaN
            yield f'{name}: {key} {b:.7g}, recorded {a:.7g}: {abs(a - b) / scale:.1e} of the largest'


def file_of(case: str) -> Path:
    return FOLDER / f'{case}.json'


def read(case: str) -> dict[str, Any]:
    """Return the record of a case; one without outputs if there is none."""
    return json.loads(file_of(case).read_text()) if file_of(case).exists() else dict(outputs={})


def write(case: str, outputs: Mapping[str, Any], reason: str) -> None:
    here = environment()
    made_by = dict(python=platform.python_version(), cpu=here['cpu'], **here['versions'])
    record = dict(reason=reason, made_by=made_by, outputs=outputs)
    lines = ',\n'.join(f'  {json.dumps(name)}: {json.dumps(output)}' for name, output in record['outputs'].items())
    head = json.dumps(dict(reason=reason, made_by=made_by), indent=1).removesuffix('\n}')
    FOLDER.mkdir(exist_ok=True)
    file_of(case).write_text(f'{head},\n "outputs": {{\n{lines}\n }}\n}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'cases', nargs='*', choices=[*CASES, []], metavar='CASE', help=f'{", ".join(CASES)} (default: all)'
    )
    parser.add_argument('--write', action='store_true', help='record the differing cases again; needs --reason')
    parser.add_argument('--reason', help='why the numbers changed; written to the files')
    args = parser.parse_args()
    if args.write != bool((args.reason or '').strip()):
        parser.error('--write needs --reason, and --reason needs --write.')

    changed = {}
    for case in args.cases or CASES:
        outputs = compute(case)
        problems = list(find_mismatches(read(case)['outputs'], outputs))
        print(f'{case}: {len(problems)} of {len(outputs)} outputs differ' if problems else f'{case}: as recorded')
        for problem in problems:
            print(f'  {problem}')
        if problems:
            changed[case] = outputs
    if args.write:
        for case, outputs in changed.items():
            write(case, outputs, args.reason)
        print(f'wrote: {", ".join(map(str, map(file_of, changed))) or "nothing"}')
    elif changed:
        sys.exit(f'Nothing was written. To record these numbers: {sys.argv[0]} --write --reason "…"')


if __name__ == '__main__':
    main()
