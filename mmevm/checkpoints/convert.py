"""Other people's names and shapes become mmevm's, and each of their tensors is accounted for."""

import re
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmevm.errors import CheckpointError
from mmevm.registry import MODELS

StateDict = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ConversionReport:
    """What ``convert_checkpoint`` recognised, and where each entry of the file went.

    Attributes:
        source: Whose checkpoint of what it is.
        arch: Name of the architecture.
        weights: 'ema' or 'model', None if the file does not tell.
        kept: Names that stayed as they were.
        renamed: Old names and new ones.
        reshaped: New names of LayerNorms that came with axes of size 1.
        left_out: Entries that are no weights, or those not chosen, and why they were left out.
    """

    source: str
    arch: str
    weights: str | None
    kept: list[str]
    renamed: dict[str, str]
    reshaped: list[str]
    left_out: dict[str, str]

    def __str__(self) -> str:
        chosen = f', {self.weights} weights' if self.weights else ''
        moves = Counter((_group(old), _group(new)) for old, new in self.renamed.items())
        lines = [
            f'recognised: {self.source}, EfficientViM-{self.arch.upper()}{chosen}',
            f'loaded: {len(self.kept) + len(self.renamed)} tensors, {len(self.reshaped)} of them LayerNorms made 1-D',
            f'renamed: {len(self.renamed)}',
            *(f'  {old} -> {new} ({count})' for (old, new), count in moves.items()),
            f'left out: {len(self.left_out)}',
            *(f'  {name}: {reason}' for name, reason in self.left_out.items()),
        ]
        return '\n'.join(lines)


def convert_checkpoint(checkpoint: Any, weights: str | None = None) -> tuple[dict[str, Any], ConversionReport]:
    """Give the weights of an EfficientViM the names and shapes of mmevm.

    Recognised are classifiers of the authors and of timm, detectors of the authors (MMDetection 2), and what was
    converted before, which stays as it is. Every tensor must be there with its shape, and no other one.

    Args:
        checkpoint: The content of a file, as ``read_checkpoint`` gives it.
        weights: What to take from a file that has both: 'ema', to which the published accuracy belongs, or 'model',
            from which the authors started their detectors. None is 'ema' where there is one.

    Returns:
        ``{'state_dict': ..., 'meta': ...}``, whose names begin with ``backbone.`` and ``head.`` or are those of a
        detector, and the report.

    Raises:
        CheckpointError: If it is none of these, if a tensor is missing, unknown or of another shape, or if there are no
            such weights.
        ValueError: If ``weights`` is neither of the two.
    """
    old_state, weights, left_out = unwrap(checkpoint, weights)
    names = remap_keys(old_state)
    state = {names[old]: flatten_norm(names[old], tensor) for old, tensor in old_state.items()}
    renamed = {old: new for old, new in names.items() if old != new}
    reshaped = [new for old, new in names.items() if old_state[old].shape != state[new].shape]

    if not any(name.startswith('backbone.') for name in state):
        raise CheckpointError(
            f'These are no weights of EfficientViM: their names are {some(state)}, '
            "but 'patch_embed.…' and 'stages.…' were expected, with or without 'backbone.' before them."
        )
    if find_spec('mmdet') is None and any(name.startswith(('neck.', *_DETECTOR_HEADS)) for name in state):
        raise CheckpointError(
            'This is a detector, which is checked against the heads of MMDetection: install that first.'
        )
    arch, expected = _expected_backbone(state)
    for shapes in (_expected_head(state, arch), _expected_neck(state, arch), _expected_detector_heads(state)):
        expected.update(shapes)
    problems = differences(expected, state)
    unknown = [name for name in state if name not in expected]
    if unknown:
        problems.append(f'{len(unknown)} unknown ({some(unknown)})')
    if problems:
        raise CheckpointError(
            f'The checkpoint is not a complete EfficientViM-{arch.upper()}, the architecture it comes closest to: of '
            f'{len(expected)} tensors, {"; ".join(problems)}. Nothing was converted.'
            + ('' if renamed or reshaped else " The names are mmevm's own: such a file can be used as it is.")
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
        left_out=left_out,
    )
    return {'state_dict': state, 'meta': meta}, report


# Entries that hold a state dict, and which weights these are: the first is taken if there is a choice.
_WRAPPERS = {'model_ema': 'ema', 'state_dict_ema': 'ema', 'model': 'model', 'state_dict': 'model'}


def unwrap(checkpoint: Any, weights: str | None = None) -> tuple[StateDict, str | None, dict[str, str]]:
    """Find the state dict in a checkpoint: it, which weights it holds, and what else there was, with the reason."""
    if weights not in (None, 'ema', 'model'):
        raise ValueError(f"weights={weights!r}: choose 'ema' or 'model', or None for 'ema' where there is one.")
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'A checkpoint is a dict of tensors, but this file holds a {type(checkpoint).__name__}.')
    found = {
        entry: label
        for entry, label in _WRAPPERS.items()
        if isinstance(value := checkpoint.get(entry), dict) and any(isinstance(item, Tensor) for item in value.values())
    }
    if weights and weights not in found.values():
        raise CheckpointError(
            f"There are no '{weights}' weights in this file, which has {some(found) or 'one set without a name'}: "
            'choose others, or leave the choice out.'
        )
    left_out, chosen = {}, None
    if found:
        wrapper = next(entry for entry, label in found.items() if weights in (None, label))
        # A lone 'state_dict' may be either: mmengine's EMAHook puts the averaged weights there.
        chosen = found[wrapper] if len(found) > 1 or wrapper != 'state_dict' else None
        for entry, value in checkpoint.items():
            if entry in found and entry != wrapper:
                left_out[entry] = f"'{wrapper}' was chosen: {_kind(value)}"
            elif entry != wrapper:
                left_out[entry] = f"beside '{wrapper}', which holds the weights: {_kind(value)}"
        checkpoint = checkpoint[wrapper]
    metadata = getattr(checkpoint, '_metadata', None)  # versions of layers, which load_state_dict reads
    state: StateDict = OrderedDict()
    for name, value in checkpoint.items():
        if isinstance(value, Tensor) and isinstance(name, str):
            state[name] = value.detach()
        else:
            left_out[str(name)] = f'not a named tensor, but {_kind(value)}'
    if not state:
        raise CheckpointError(f'There are no tensors in this file, only {some(left_out) or "an empty dict"}.')
    if all(name.startswith('module.') for name in state):  # of DistributedDataParallel
        state = OrderedDict((name.removeprefix('module.'), tensor) for name, tensor in state.items())
    if isinstance(metadata, dict) and all(isinstance(layer, dict) for layer in metadata.values()):
        state._metadata = metadata  # type: ignore[attr-defined]
    return state, chosen, left_out


_OUR_PREFIXES = {
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
    """Our name of each of their names."""
    indices = [int(match[1]) for name in state if (match := re.match(r'neck\.extra_(?:trans|fpn)_convs\.(\d)\.', name))]
    names = {name: _our_name(name, upsamples=max(indices, default=-1) + 1) for name in state}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise CheckpointError(f'{len(twice)} tensors are in the file under two names, theirs and ours: {some(twice)}.')
    return names


def _our_name(name: str, upsamples: int) -> str:
    # The authors count these from the finest level, but extra_trans_convs and both of ours from the coarsest.
    if match := re.match(r'neck\.extra_fpn_convs\.(\d)\.', name):
        return f'neck.upsample_fpn_convs.{upsamples - 1 - int(match[1])}.{name[match.end() :]}'
    for theirs, ours in _OUR_PREFIXES.items():
        if name == theirs or (theirs.endswith('.') and name.startswith(theirs)):
            return ours + name[len(theirs) :]
    return name


def flatten_norm(name: str, tensor: Tensor) -> Tensor:
    """The authors store LayerNorms as (1, C, 1) or (1, C, 1, 1), to be broadcast; everyone else as (C,)."""
    is_norm = re.search(r'(blocks\.\d+\.norm|head\.norm\.\d+|neck\.pre_norms\.\d+)\.(weight|bias)$', name)
    shapes = ((1, tensor.numel(), 1), (1, tensor.numel(), 1, 1))
    return tensor.flatten() if is_norm and tensor.shape in shapes else tensor


def _source(old_state: StateDict, reshaped: bool) -> str:
    if any(name.startswith('backbone.') for name in old_state):
        return "a detector of the authors'" if reshaped else "a checkpoint of mmevm's"
    network = 'classifier' if 'weights' in old_state else 'backbone'
    return f"a {network} of the authors'" if reshaped else f"a {network} in timm's layout"


def _dataset_meta(meta: dict[str, Any]) -> dict[str, Any]:
    """The names of a detector's classes, as MMDetection 2 or 3 keeps them; later versions read 'dataset_meta'."""
    dataset = meta.get('dataset_meta', {key.lower(): meta[key] for key in ('CLASSES', 'PALETTE') if key in meta})
    if not (isinstance(dataset, dict) and isinstance(dataset.get('classes'), list | tuple)):
        return {}
    names = {key: value for key, value in dataset.items() if key in ('classes', 'palette') and _is_plain(value)}
    return {'dataset_meta': names} if 'classes' in names else {}


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, list | tuple) else isinstance(value, str | int)


def _kind(value: Any) -> str:
    return f'{len(value)} entries' if isinstance(value, dict | list | tuple) else type(value).__name__


def some(names: Iterable[str]) -> str:
    """The first few names, for a sentence."""
    names = list(names)
    return ', '.join(names[:4]) + (', …' if len(names) > 4 else '')


def _group(name: str) -> str:
    """Shorten a name for the report: 'stages.0.blocks.1.alpha' to 'stages.*', but keep an index that changes."""
    parts = name.split('.')
    if name.startswith(('neck.extra_fpn_convs.', 'neck.upsample_fpn_convs.')):
        depth = 3
    else:
        depth = 2 if parts[0] in ('backbone', 'neck', 'head') else 1
    return '.'.join([*parts[:depth], '*']) if len(parts) > depth else name


def state_shapes(module: nn.Module) -> Shapes:
    """The shapes of what a module's state dict holds."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}


def differences(expected: Shapes, state: StateDict) -> list[str]:
    """What of the expected names and shapes is missing or different, in words; empty if nothing is."""
    missing = [name for name in expected if name not in state]
    wrong = [name for name in expected if name in state and tuple(state[name].shape) != expected[name]]
    problems = []
    if missing:
        problems.append(f'{len(missing)} missing ({some(missing)})')
    if wrong:
        shapes = [f'{name}: {expected[name]} expected, {tuple(state[name].shape)} in the file' for name in wrong]
        problems.append(f'{len(wrong)} of another shape ({some(shapes)})')
    return problems


def check_values(state: StateDict, exempt: Iterable[str]) -> None:
    """Refuse integers in place of learned weights, and weights that are NaN or infinite.

    Args:
        state: Tensors that a model is to receive.
        exempt: Names of tensors that may hold anything, such as counters and masks.
    """
    exempt = set(exempt)
    state = {name: tensor for name, tensor in state.items() if name not in exempt}
    whole = [name for name, tensor in state.items() if not (tensor.is_floating_point() or tensor.is_complex())]
    if whole:
        raise CheckpointError(
            f'{len(whole)} tensors are of type {state[whole[0]].dtype}, where floating-point numbers are needed '
            f'({some(whole)}): take the file as it was before it was quantised.'
        )
    # float: models are float32, in which larger numbers of a float64 file are infinite.
    values = ((name, tensor if tensor.is_complex() else tensor.float()) for name, tensor in state.items())
    infinite = [name for name, tensor in values if not tensor.isfinite().all()]
    if infinite:
        raise CheckpointError(
            f'{len(infinite)} tensors hold NaN or infinite numbers ({some(infinite)}), as after a training that '
            'diverged: take an earlier checkpoint of it.'
        )


# What an architecture must hold


@lru_cache
def _backbone_shapes() -> dict[str, Shapes]:
    backbone: Any = MODELS.get('mmevm.EfficientViM')
    with torch.random.fork_rng(devices=[]):  # do not advance the RNG
        return {
            arch: {f'backbone.{name}': shape for name, shape in state_shapes(backbone(arch)).items()}
            for arch in backbone.arch_settings
        }


def _expected_backbone(state: StateDict) -> tuple[str, Shapes]:
    """The architecture with which most tensors agree, and what it must hold."""

    def agreement(arch: str) -> int:
        shapes = _backbone_shapes()[arch]
        return sum(name in state and tuple(state[name].shape) == shapes[name] for name in shapes)

    arch = max(_backbone_shapes(), key=agreement)
    return arch, dict(_backbone_shapes()[arch])


def _expected_head(state: StateDict, arch: str) -> Shapes:
    """The fusion head: LayerNorm and Linear for each stage's hidden states and for the last map, and their weights."""
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
    finer, levels = count('upsample_convs'), max(count('fpn_convs'), len(channels))
    coarser = state.get(f'neck.fpn_convs.{len(channels)}.conv.weight')
    on_input = coarser is not None and coarser.shape[1:2] == (channels[-1],)
    with torch.random.fork_rng(devices=[]), torch.device('meta'):  # a file may claim any size
        neck = MODELS.build(
            dict(
                type='mmevm.UpsampleFPN',
                in_channels=channels,
                out_channels=_size(state, 'neck.lateral_convs.0.conv.bias', default=256),
                num_outs=finer + levels,
                num_upsamples=finer,
                add_extra_convs=levels > len(channels) and ('on_input' if on_input else 'on_output'),
            ),
        )
    return {f'neck.{name}': tuple(tensor.shape) for name, tensor in neck.state_dict().items()}


_DETECTOR_HEADS = ('rpn_head.', 'roi_head.', 'bbox_head.')


def _expected_detector_heads(state: StateDict) -> Shapes:
    """The heads of mmdet's stock Mask R-CNN, Faster R-CNN or RetinaNet, with as many classes as the file has."""
    if not any(name.startswith(_DETECTOR_HEADS) for name in state):
        return {}
    import mmdet  # here, because a classifier shall not need it

    two_stage = not any(name.startswith('bbox_head.') for name in state)
    base = 'mask-rcnn_r50_fpn.py' if two_stage else 'retinanet_r50_fpn.py'
    model = Config.fromfile(Path(mmdet.__file__).parent / '.mim' / 'configs' / '_base_' / 'models' / base).model
    if two_stage:
        classes = _size(state, 'roi_head.bbox_head.fc_cls.bias', default=81) - 1
        model.roi_head.bbox_head.num_classes = model.roi_head.mask_head.num_classes = classes
    else:
        anchors = model.bbox_head.anchor_generator.scales_per_octave * len(model.bbox_head.anchor_generator.ratios)
        model.bbox_head.num_classes = _size(state, 'bbox_head.retina_cls.bias', default=80 * anchors) // anchors
    with torch.random.fork_rng(devices=[]), torch.device('meta'):
        stock = MODELS.build(dict(model, _scope_='mmdet')).state_dict()
    has_masks = any(name.startswith('roi_head.mask_head.') for name in state)
    return {
        name: tuple(tensor.shape)
        for name, tensor in stock.items()
        if name.startswith(_DETECTOR_HEADS) and (has_masks or not name.startswith('roi_head.mask_head.'))
    }


def _size(state: StateDict, name: str, default: int) -> int:
    return state[name].numel() if name in state else default


def _channels(arch: str) -> list[int]:
    backbone: Any = MODELS.get('mmevm.EfficientViM')
    return list(backbone.arch_settings[arch]['embed_dims'])
