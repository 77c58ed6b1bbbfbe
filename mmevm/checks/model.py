"""Compare the parts of a model with each other and with the data: channels, strides, number of classes."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from mmengine.config import Config
from torch import Tensor, nn

from mmevm.errors import ConfigError

from .config import iter_dicts, preview, type_name

_HEADS = ('bbox_head', 'mask_head', 'head', 'decode_head', 'auxiliary_head')


def heads(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the heads whose ``num_classes`` should be the number of classes of the data, with their dotted keys."""
    for name, module in model.named_modules():
        first, _, last = name.partition('.')
        is_own = first in ('roi_head', *_HEADS)  # not of a model in the model
        name_of_head = first if last.isdecimal() else (last or first).split('.')[0]  # the index is that of a cascade
        if is_own and name_of_head in _HEADS and 'RPN' not in type(module).__name__:
            yield f'model.{name}', module


def compare_class_counts(model: nn.Module, dataset: Any, key: str) -> Iterator[str]:
    """Warn about heads with another number of classes than the dataset.

    Args:
        model: A detector or classifier.
        dataset: The dataset.
        key: Dotted key of the dataset in the config.
    """
    meta = getattr(dataset, 'metainfo', None) or {}
    classes = meta.get('thing_classes') or meta.get('classes')
    if not classes or isinstance(classes, str) or hasattr(model, 'language_model'):  # which reads classes as text
        return
    for name, head in heads(model):
        number = getattr(head, 'num_classes', len(classes))
        if number != len(classes) and isinstance(number, int):
            rest = number - len(classes)
            text = f'{rest} outputs will never be trained' if rest > 0 else f'{-rest} classes will not be learned'
            yield f'{name}.num_classes={number}, but {key} has {len(classes)} classes; {text}.'


def check_topk(cfg: Config, model: nn.Module, splits: list[str]) -> None:
    """Check the ``topk`` of MMPretrain's Accuracy, which otherwise fails after the first epoch.

    Raises:
        ConfigError: If k is larger than the number of classes.
    """
    numbers = [getattr(head, 'num_classes', None) for _, head in heads(model)]
    classes = min((number for number in numbers if isinstance(number, int)), default=math.inf)
    for split in splits:
        for key, metric in iter_dicts(cfg.get(f'{split}_evaluator'), f'{split}_evaluator'):
            if type_name(metric) == 'Accuracy' and np.max(metric.get('topk', 1)) > classes:
                topk = metric['topk']
                raise ConfigError(f'{key}.topk={topk}, but the head has num_classes={classes}. Set {key}.topk=(1,).')


@dataclass(eq=False)
class Part:
    """A module that has a dict of its own in the config.

    Attributes:
        key: Dotted key, such as 'model.neck'.
        module: The module.
        cfg: Its config.
        inputs: Shapes (B, C, H, W) of the feature maps that it received in its last call.
        outputs: Shapes of the feature maps that it returned; None if its last call has not returned.
    """

    key: str
    module: nn.Module
    cfg: dict
    inputs: list[tuple[int, ...]] = field(default_factory=list)
    outputs: list[tuple[int, ...]] | None = None


class FeatureTracer:
    """Record the shapes of the feature maps between the parts of a model, while it is used as a context manager.

    Args:
        model: A detector, segmentor or classifier.
        cfg: Its config.
    """

    def __init__(self, model: nn.Module, cfg: dict) -> None:
        modules = {f'model.{name}': module for name, module in model.named_modules()}
        self.parts = [
            Part(key, modules[key], part)
            for key, part in iter_dicts(cfg, 'model')
            if key in modules and 'type' in part and not key.startswith('model.data_preprocessor')
        ]
        self.called: list[Part] = []
        self._handles: list[Any] = []

    def __enter__(self) -> 'FeatureTracer':
        for part in self.parts:
            if hasattr(part.module, 'in_index'):  # a head of MMSegmentation, whose loss() calls forward() without hooks
                part.module.forward = partial(self._run, part, part.module.forward)
                continue
            self._handles.append(part.module.register_forward_pre_hook(partial(self._begin, part)))
            self._handles.append(part.module.register_forward_hook(partial(self._end, part)))
        return self

    def __exit__(self, *args: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for part in self.parts:
            if isinstance(part.module.__dict__.get('forward'), partial):
                del part.module.forward  # that of the class remains

    def _begin(self, part: Part, module: nn.Module, args: tuple) -> None:
        part.inputs, part.outputs = _shapes(args[0] if args else None), None
        if part not in self.called:
            self.called.append(part)

    def _run(self, part: Part, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._begin(part, part.module, args)
        output = forward(*args, **kwargs)
        self._end(part, part.module, args, output)
        return output

    @staticmethod
    def _end(part: Part, module: nn.Module, args: tuple, output: Any) -> None:
        part.outputs = _shapes(output)

    def explain(self) -> str | None:
        """Return why the forward pass failed, or None if the numbers of channels are not the cause."""
        for part in reversed(self.called):
            if part.outputs is None and (text := self._explain_channels(part)):
                return text
        return None

    def warnings(self) -> Iterator[str]:
        """Yield a warning for each head whose anchors or points have other strides than its feature maps."""
        for part in self.called:
            strides = getattr(getattr(part.module, 'prior_generator', None), 'strides', None)
            if not isinstance(strides, (list, tuple)) or not _are_maps(part.inputs) or len(strides) != len(part.inputs):
                continue
            expected = [int(stride[0] if isinstance(stride, (list, tuple)) else stride) for stride in strides]
            real = [self._stride(shape) for shape in part.inputs]
            # Strides follow from rounded sizes, so very small maps and small deviations say nothing.
            compared = [pair for shape, *pair in zip(part.inputs, real, expected, strict=True) if min(shape[2:]) >= 4]
            if any(not 2 / 3 < stride / anchors < 3 / 2 for stride, anchors in compared):
                yield (
                    f'{part.key} has anchors or points for strides {expected}, but {self._source(part)} has '
                    f"strides {real}. Use a neck with these strides, such as type='mmevm.UpsampleFPN' with "
                    f'num_upsamples, or change the strides of {part.key}.'
                )

    def table(self) -> Iterator[str]:
        """Yield a line for each part: channels and strides of its output or, for a head, of its input."""
        batch_size = next((part.inputs[0][0] for part in self.called if part.inputs), 0)
        for part in self.called:
            is_head = part.key.endswith('head') or not part.outputs
            shapes = part.inputs if is_head else part.outputs
            # RoIs, layers of a transformer and queries have another first dimension than the batch.
            if not shapes or not _are_maps(shapes) or shapes[0][0] != batch_size or '.loss' in part.key:
                continue
            channels = preview(dict.fromkeys(shape[1] for shape in shapes))
            strides = preview(self._stride(shape) for shape in shapes)
            verb = 'takes' if is_head else 'returns'
            yield f'{part.key} ({type(part.module).__name__}) {verb} {channels} channels at stride {strides}'

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the backbone's input in pixels."""
        return next((p.inputs[0][2:] for p in self.called if p.inputs and len(p.inputs[0]) == 4), None)

    def _stride(self, shape: tuple[int, ...]) -> int:
        if self.image_size is None:
            return 0
        height = self.image_size[0]
        rounded = max(1, round(height / shape[2]))
        return next((2**i for i in range(10) if math.ceil(height / 2**i) == shape[2]), rounded)

    def _source(self, part: Part) -> str:
        """Return the key of the part whose output is this part's input."""
        for other in self.called:
            if other is not part and other.outputs and part.inputs == other.outputs[: len(part.inputs)] != []:
                return other.key
        return 'the previous part'

    def _explain_channels(self, part: Part) -> str | None:
        # An extractor of RoIs keeps the number of channels.
        argument = 'out_channels' if 'featmap_strides' in part.cfg else 'in_channels'
        name, wanted, source = f'{part.key}.{argument}', part.cfg.get(argument), self._source(part)
        is_list = isinstance(wanted, (list, tuple))
        given = [shape[1] for shape in part.inputs if len(shape) > 1]
        if hasattr(part.module, 'in_index'):
            return _explain_index(part, given, source)
        given = given if is_list else sorted(set(given))
        # Some necks start with the coarsest map.
        if not given or not wanted or (sorted(wanted) == sorted(given) if is_list else wanted in given):
            return None
        finest = self._stride(part.inputs[0])
        # The FPN of a ResNet takes maps from stride 4 on, and drops the first `start_level` of them.
        if is_list and type_name(part.cfg) == 'FPN' and source == 'model.backbone' and finest > 4:
            finer = max(0, round(math.log2(finest / 4)) - part.cfg.get('start_level', 0))
            fix = _upsample_fpn(part, given, num_upsamples=finer)
        elif is_list or len(given) == 1:
            fix = f'Set {name}={given if is_list else given[0]}.'
        else:
            fix = "Add a neck, such as type='mmevm.UpsampleFPN'."
        return f'{name}={wanted} does not match the output channels {given} of {source}. {fix}'


def _explain_index(part: Part, given: list[int], source: str) -> str | None:
    """Compare the maps that a head of MMSegmentation selects with their number and channels."""
    wanted: Any = part.module.in_channels
    index: Any = part.module.in_index
    indices = [*index] if isinstance(index, (list, tuple)) else [index]
    channels = [*wanted] if isinstance(wanted, (list, tuple)) else [wanted]
    if all(-len(given) <= i < len(given) for i in indices) and [given[i] for i in indices] == channels:
        return None
    several = isinstance(index, (list, tuple))
    new: Any = (given, list(range(len(given)))) if several else (given[-1], len(given) - 1)
    return (
        f'{part.key}.in_channels={wanted} and in_index={index} do not match the {len(given)} maps of {source}, with '
        f'{given} channels. Set in_channels={new[0]} and in_index={new[1]}{"" if several else ", for example"}.'
    )


def _upsample_fpn(part: Part, channels: list[int], num_upsamples: int) -> str:
    """Return the neck that replaces the FPN of a ResNet."""
    kept = {key: part.cfg[key] for key in ('out_channels', 'num_outs', 'add_extra_convs') if key in part.cfg}
    neck = dict(in_channels=channels, num_upsamples=num_upsamples, **kept)
    arguments = ', '.join(f'{key}={value!r}' for key, value in neck.items())
    return f"Replace the neck: {part.key}=dict(_delete_=True, type='mmevm.UpsampleFPN', {arguments})."


def _shapes(value: Any) -> list[tuple[int, ...]]:
    if isinstance(value, Tensor):
        return [tuple(value.shape)]
    if isinstance(value, (list, tuple)) and all(isinstance(item, Tensor) for item in value):
        return [tuple(item.shape) for item in value]
    return []


def _are_maps(shapes: list[tuple[int, ...]]) -> bool:
    return bool(shapes) and all(len(shape) == 4 for shape in shapes)
