"""Convert checkpoints from the authors and timm to the names and shapes of mmevm, accounting for every tensor."""

import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor

from mmevm.errors import CheckpointError
from mmevm.registry import MODELS

from .state_dict import Shapes, StateDict, check_values, find_mismatches, preview, state_shapes, unwrap


@dataclass(frozen=True)
class ConversionReport:
    """What ``convert_checkpoint`` did with each entry of a file.

    Attributes:
        source: Kind of the checkpoint, such as "a classifier of the authors'".
        arch: Name of the architecture, such as 'm4'.
        weights: 'ema' or 'model'; None if the file does not tell.
        kept: Names that did not change.
        renamed: Old names and new ones.
        reshaped: New names of LayerNorm tensors that were flattened to (C,).
        skipped: Entries that are not the chosen weights, with the reason.
    """

    source: str
    arch: str
    weights: str | None
    kept: list[str]
    renamed: dict[str, str]
    reshaped: list[str]
    skipped: dict[str, str]

    def __str__(self) -> str:
        chosen = f', {self.weights} weights' if self.weights else ''
        renamings = Counter((_group(old), _group(new)) for old, new in self.renamed.items())
        lines = [
            f'recognized: {self.source}, EfficientViM-{self.arch.upper()}{chosen}',
            f'converted: {len(self.kept) + len(self.renamed)} tensors, {len(self.reshaped)} LayerNorms flattened',
            f'renamed: {len(self.renamed)}',
            *(f'  {old} -> {new} ({count})' for (old, new), count in renamings.items()),
            f'skipped: {len(self.skipped)}',
            *(f'  {name}: {reason}' for name, reason in self.skipped.items()),
        ]
        return '\n'.join(lines)


def convert_checkpoint(checkpoint: Any, weights: str | None = None) -> tuple[dict[str, Any], ConversionReport]:
    """Convert the weights of an EfficientViM to the names and shapes of mmevm.

    Classifiers of the authors and of timm, detectors and segmentors of the authors (MMDetection 2, MMSegmentation 0)
    and converted checkpoints, which do not change, are recognized. Every tensor of the network must be there with its
    shape, and no other tensor.

    Args:
        checkpoint: The content of a file, as ``read_checkpoint`` returns it.
        weights: Which weights to take from a file that has both: 'ema', whose accuracy is published, or 'model', from
            which the authors trained their detectors. None takes 'ema' if there are both.

    Returns:
        ``{'state_dict': ..., 'meta': ...}`` with names that begin with ``backbone.`` and ``head.`` or are those of a
        detector, and the report.

    Raises:
        CheckpointError: If it is another network, if a tensor is missing, unknown or of another shape, or if there are
            no such weights.
        ValueError: If ``weights`` is neither of the two.
    """
    old_state, weights, skipped = unwrap(checkpoint, weights)
    names = remap_keys(old_state)
    state = {names[old]: flatten_norm(names[old], tensor) for old, tensor in old_state.items()}
    renamed = {old: new for old, new in names.items() if old != new}
    reshaped = [new for old, new in names.items() if old_state[old].shape != state[new].shape]

    if not any(name.startswith('backbone.') for name in state):
        raise CheckpointError(
            f"The tensors are named {preview(state)}, but an EfficientViM has 'patch_embed.…' and 'stages.…', with or "
            "without the prefix 'backbone.'. Use a checkpoint of an EfficientViM."
        )
    segmentor = any(name.startswith('decode_head.') for name in state)
    if segmentor and find_spec('mmseg') is None:
        raise CheckpointError(
            'This is a segmentor, whose head is checked against MMSegmentation. Install MMSegmentation.'
        )
    if find_spec('mmdet') is None and any(name.startswith(('neck.', *_DETECTOR_HEADS)) for name in state):
        raise CheckpointError('This is a detector, whose heads are checked against MMDetection. Install MMDetection.')
    arch, expected = _expected_backbone(state)
    for shapes in (
        _expected_head(state, arch),
        _expected_neck(state, arch),
        _expected_detector_heads(state),
        _expected_decode_head(state),
    ):
        expected.update(shapes)
    problems = find_mismatches(expected, state)
    unknown = [name for name in state if name not in expected]
    if unknown:
        problems.append(f'{len(unknown)} unknown ({preview(unknown)})')
    if problems:
        raise CheckpointError(
            f'The checkpoint is not a complete EfficientViM-{arch.upper()}, the most similar architecture: of '
            f'{len(expected)} tensors, {"; ".join(problems)}. Nothing was converted.'
            + ('' if renamed or reshaped else ' Its names are those of mmevm: use the file without converting it.')
        )

    check_values(state, [name for name in state if name.endswith('num_batches_tracked')])

    meta: dict[str, Any] = {'source': _source(old_state, bool(reshaped)), 'arch': arch, 'weights': weights}
    old_meta = checkpoint.get('meta')
    if isinstance(old_meta, dict):
        if isinstance(old_meta.get('source'), str):  # converted before
            meta = {key: old_meta.get(key) for key in meta}
        meta.update(_dataset_meta(old_meta))
    report = ConversionReport(
        source=meta['source'],
        arch=arch,
        weights=meta['weights'],
        kept=[name for name in names if name not in renamed],
        renamed=renamed,
        reshaped=reshaped,
        skipped=skipped,
    )
    return {'state_dict': state, 'meta': meta}, report


# Names

_PREFIXES = {
    'patch_embed.': 'backbone.patch_embed.',
    'stages.': 'backbone.stages.',
    'norm.': 'head.norm.',
    'weights': 'head.weights',
    'heads.': 'head.heads.',
    'weights_dist': 'head.weights_dist',
    'heads_dist.': 'head.heads_dist.',
    'neck.batch_norm.': 'neck.pre_norms.',  # the authors' name for LayerNorms
    'neck.extra_trans_convs.': 'neck.upsample_convs.',
}


def remap_keys(state: StateDict) -> dict[str, str]:
    """Return the name in mmevm for each name of the authors, of timm or of mmevm.

    Raises:
        CheckpointError: If two names become the same.
    """
    indices = [int(match[1]) for name in state if (match := re.match(r'neck\.extra_(?:trans|fpn)_convs\.(\d)\.', name))]
    names = {name: _remap_key(name, upsamples=max(indices, default=-1) + 1) for name in state}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise CheckpointError(
            f'{len(twice)} tensors are in the file twice, under old names and as {preview(twice)}. Remove the old ones.'
        )
    return names


def _remap_key(name: str, upsamples: int) -> str:
    # The authors count extra_fpn_convs from the finest level. Their extra_trans_convs and both in mmevm count from the
    # coarsest.
    if match := re.match(r'neck\.extra_fpn_convs\.(\d)\.', name):
        return f'neck.upsample_fpn_convs.{upsamples - 1 - int(match[1])}.{name[match.end() :]}'
    for old, new in _PREFIXES.items():
        if name == old or (old.endswith('.') and name.startswith(old)):
            return new + name[len(old) :]
    return name


def flatten_norm(name: str, tensor: Tensor) -> Tensor:
    """Flatten a LayerNorm of the authors, (1, C, 1) or (1, C, 1, 1), to (C,); return other tensors as they are."""
    is_norm = re.search(r'(blocks\.\d+\.norm|head\.norm\.\d+|neck\.pre_norms\.\d+)\.(weight|bias)$', name)
    shapes = ((1, tensor.numel(), 1), (1, tensor.numel(), 1, 1))
    return tensor.flatten() if is_norm and tensor.shape in shapes else tensor


def _source(old_state: StateDict, reshaped: bool) -> str:
    if any(name.startswith('backbone.') for name in old_state):
        model = 'segmentor' if any(name.startswith('decode_head.') for name in old_state) else 'detector'
        return f"a {model} of the authors'" if reshaped else "a checkpoint of mmevm's"
    network = 'classifier' if 'weights' in old_state else 'backbone'
    return f"a {network} of the authors'" if reshaped else f"a {network} in timm's layout"


def _dataset_meta(meta: dict[str, Any]) -> dict[str, Any]:
    """Return the class names of MMDetection 2 or 3 under 'dataset_meta', which MMDetection 3 reads."""
    dataset = meta.get('dataset_meta', {key.lower(): meta[key] for key in ('CLASSES', 'PALETTE') if key in meta})
    if not (isinstance(dataset, dict) and isinstance(dataset.get('classes'), list | tuple)):
        return {}
    names = {key: value for key, value in dataset.items() if key in ('classes', 'palette') and _is_plain(value)}
    return {'dataset_meta': names} if 'classes' in names else {}


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, list | tuple) else isinstance(value, str | int)


def _group(name: str) -> str:
    """Shorten a name for the report: 'stages.0.blocks.1.alpha' to 'stages.*'. Keep an index that is remapped."""
    parts = name.split('.')
    if name.startswith(('neck.extra_fpn_convs.', 'neck.upsample_fpn_convs.')):
        depth = 3
    else:
        depth = 2 if parts[0] in ('backbone', 'neck', 'head') else 1
    return '.'.join([*parts[:depth], '*']) if len(parts) > depth else name


# Expected shapes


@lru_cache
def _backbone_shapes() -> dict[str, Shapes]:
    backbone: Any = MODELS.get('mmevm.EfficientViM')
    cfg: dict[str, Any] = dict(prefix='backbone.', device='cpu', type='mmevm.EfficientViM')
    return {arch: _build_shapes(**cfg, arch=arch) for arch in backbone.arch_settings}


def _build_shapes(prefix: str, device: str = 'meta', **cfg: Any) -> Shapes:
    """Return the shapes of a model. It is built on the meta device where its size depends on the file."""
    with torch.random.fork_rng(devices=[]), torch.device(device):  # do not advance the RNG
        return {prefix + name: shape for name, shape in state_shapes(MODELS.build(cfg)).items()}


def _expected_backbone(state: StateDict) -> tuple[str, Shapes]:
    """Return the architecture that matches the most tensors, and its shapes."""

    def agreement(arch: str) -> int:
        shapes = _backbone_shapes()[arch]
        return sum(name in state and tuple(state[name].shape) == shapes[name] for name in shapes)

    arch = max(_backbone_shapes(), key=agreement)
    return arch, dict(_backbone_shapes()[arch])


def _expected_head(state: StateDict, arch: str) -> Shapes:
    """Return the shapes of the fusion head: LayerNorm and Linear per stage and for the last map, fusion weights."""
    if not any(name.startswith('head.') for name in state):
        return {}
    channels = _channels(arch)
    channels.append(channels[-1])
    classes = _size(state, 'head.heads.0.bias', default=1000)
    distilled = any(name.startswith(('head.heads_dist', 'head.weights_dist')) for name in state)
    shapes: Shapes = {f'head.norm.{i}.{leaf}': (c,) for i, c in enumerate(channels) for leaf in ('weight', 'bias')}
    for suffix in ('', '_dist') if distilled else ('',):
        shapes[f'head.weights{suffix}'] = (len(channels),)
        for i, c in enumerate(channels):
            shapes[f'head.heads{suffix}.{i}.weight'] = (classes, c)
            shapes[f'head.heads{suffix}.{i}.bias'] = (classes,)
    return shapes


def _expected_neck(state: StateDict, arch: str) -> Shapes:
    if not any(name.startswith('neck.') for name in state):
        return {}

    def count(convs: str) -> int:
        indices = [int(name.split('.')[2]) for name in state if re.match(rf'neck\.{convs}\.\d\.', name)]
        return max(indices, default=-1) + 1

    channels = _channels(arch)
    if not any(name.startswith('neck.pre_norms.') for name in state):
        # The stock FPN of the authors' segmentors, or one with maps of the stem; coarser levels are max-pooled.
        stem = count('lateral_convs') - len(channels)
        channels = [*(channels[0] // 2**i for i in range(stem, 0, -1)), *channels]
        width = _size(state, 'neck.lateral_convs.0.conv.bias', default=256)
        return _build_shapes(
            'neck.', type='mmdet.FPN', in_channels=channels, out_channels=width, num_outs=len(channels)
        )
    finer, levels = count('upsample_convs'), max(count('fpn_convs'), len(channels))
    coarser = state.get(f'neck.fpn_convs.{len(channels)}.conv.weight')
    on_input = coarser is not None and coarser.shape[1:2] == (channels[-1],)
    return _build_shapes(
        'neck.',
        type='mmevm.UpsampleFPN',
        in_channels=channels,
        out_channels=_size(state, 'neck.lateral_convs.0.conv.bias', default=256),
        num_outs=finer + levels,
        num_upsamples=finer,
        add_extra_convs=levels > len(channels) and ('on_input' if on_input else 'on_output'),
    )


_DETECTOR_HEADS = ('rpn_head.', 'roi_head.', 'bbox_head.')


def _expected_detector_heads(state: StateDict) -> Shapes:
    """Return the shapes of mmdet's stock Mask R-CNN, Faster R-CNN or RetinaNet heads for the classes of the file."""
    if not any(name.startswith(_DETECTOR_HEADS) for name in state):
        return {}
    import mmdet  # not needed for classifiers

    two_stage = not any(name.startswith('bbox_head.') for name in state)
    base = 'mask-rcnn_r50_fpn.py' if two_stage else 'retinanet_r50_fpn.py'
    model = Config.fromfile(Path(mmdet.__file__).parent / '.mim' / 'configs' / '_base_' / 'models' / base).model
    if two_stage:
        classes = _size(state, 'roi_head.bbox_head.fc_cls.bias', default=81) - 1
        model.roi_head.bbox_head.num_classes = model.roi_head.mask_head.num_classes = classes
    else:
        anchors = model.bbox_head.anchor_generator.scales_per_octave * len(model.bbox_head.anchor_generator.ratios)
        model.bbox_head.num_classes = _size(state, 'bbox_head.retina_cls.bias', default=80 * anchors) // anchors
    has_masks = any(name.startswith('roi_head.mask_head.') for name in state)
    return {
        name: shape
        for name, shape in _build_shapes('', **model, _scope_='mmdet').items()
        if name.startswith(_DETECTOR_HEADS) and (has_masks or not name.startswith('roi_head.mask_head.'))
    }


def _expected_decode_head(state: StateDict) -> Shapes:
    """Return the shapes of mmseg's stock FPNHead for the levels, channels and classes of the file."""
    if not any(name.startswith('decode_head.') for name in state):
        return {}
    found = (re.match(r'decode_head\.scale_heads\.(\d)\.(\d)\.conv\.weight$', name) for name in state)
    convs = Counter(int(match[1]) for match in found if match)
    # Each convolution after the first of a level is followed by an upsampling by 2.
    strides = [4 * 2 ** (convs[i] if i else 0) for i in range(max(convs, default=0) + 1)]
    first = state.get('decode_head.scale_heads.0.0.conv.weight')
    channels, width = first.shape[:2] if first is not None and first.ndim == 4 else (128, 256)
    return _build_shapes(
        'decode_head.',
        type='FPNHead',
        _scope_='mmseg',  # of its loss too
        in_channels=[width] * len(strides),
        in_index=list(range(len(strides))),
        feature_strides=strides,
        channels=channels,
        num_classes=_size(state, 'decode_head.conv_seg.bias', default=150),
        norm_cfg=dict(type='BN'),
    )


def _size(state: StateDict, name: str, default: int) -> int:
    return state[name].numel() if name in state else default


def _channels(arch: str) -> list[int]:
    backbone: Any = MODELS.get('mmevm.EfficientViM')
    return list(backbone.arch_settings[arch]['embed_dims'])
