"""What passes between the parts of a model in one iteration: channels, strides, and where it stopped."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmengine.config import Config
from torch import Tensor, nn

from mmevm.errors import ConfigError

from .config import iter_dicts, type_name


def heads(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the heads whose ``num_classes`` is, as a rule, the number of classes of the data, with their keys."""
    for name, module in model.named_modules():
        first, _, last = name.partition('.')
        is_own = first in ('roi_head', 'bbox_head', 'mask_head', 'head')  # not of a model within the model
        kind = type(module).__name__
        if is_own and (last or first).split('.')[0] in ('bbox_head', 'mask_head', 'head') and 'RPN' not in kind:
            yield f'model.{name}', module


def compare_class_counts(model: nn.Module, dataset: Any, key: str) -> Iterator[str]:
    """Warn about heads of another number of classes than the data has.

    Args:
        model: The model.
        dataset: What it is trained on, or evaluated.
        key: Key of the data set in the config.
    """
    meta = getattr(dataset, 'metainfo', None) or {}
    classes = meta.get('thing_classes') or meta.get('classes')
    if not classes or isinstance(classes, str) or hasattr(model, 'language_model'):  # whose classes are a text
        return
    for name, head in heads(model):
        number = getattr(head, 'num_classes', None)
        if not isinstance(number, int) or number == len(classes):
            continue
        consequence = (
            f'{number - len(classes)} outputs will never be trained'
            if number > len(classes)
            else f'objects of the last {len(classes) - number} classes are not learned'
        )
        yield f'{name}.num_classes={number}, but {key} has {len(classes)} classes; {consequence}.'


def check_topk(cfg: Config, model: nn.Module, splits: Sequence[str]) -> None:
    """Make sure that MMPretrain's top-k accuracy can be computed: it fails after the first epoch.

    Raises:
        ConfigError: If k is larger than the number of classes.
    """
    numbers = [getattr(head, 'num_classes', None) for _, head in heads(model)]
    classes = [number for number in numbers if isinstance(number, int)]
    for split in splits:
        for key, metric in iter_dicts(cfg.get(f'{split}_evaluator'), f'{split}_evaluator'):
            topk = metric.get('topk')
            largest = max(topk) if isinstance(topk, (list, tuple)) and topk else topk
            if type_name(metric) == 'Accuracy' and isinstance(largest, int) and classes and largest > min(classes):
                raise ConfigError(
                    f'{key}.topk={topk}, but the head has num_classes={min(classes)}. Set topk=(1,) in val_evaluator '
                    'and test_evaluator.'
                )


@dataclass
class Part:
    """A module of the model that has a dict of its own in the config.

    Attributes:
        key: Its dotted key in the config, such as 'model.neck'.
        module: The module.
        cfg: Its dict in the config.
        inputs: Shapes (B, C, H, W) of the maps that it got in its last call.
        outputs: Shapes of the maps that it returned; None while it has not.
    """

    key: str
    module: nn.Module
    cfg: dict
    inputs: list[tuple[int, ...]] = field(default_factory=list)
    outputs: list[tuple[int, ...]] | None = None


class FeatureTracer:
    """Record the shapes of the maps that a model's parts exchange, while it computes something else.

    Args:
        model: A detector, segmentor or classifier.
        cfg: Its config.
    """

    def __init__(self, model: nn.Module, cfg: dict) -> None:
        self.parts = list(_parts(model, cfg, 'model'))
        self.called: list[Part] = []
        self._handles: list[Any] = []

    def __enter__(self) -> 'FeatureTracer':
        for part in self.parts:
            self._handles.append(part.module.register_forward_pre_hook(self._begin(part)))
            self._handles.append(part.module.register_forward_hook(self._end(part)))
        return self

    def __exit__(self, *args: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begin(self, part: Part) -> Any:
        def begin(module: nn.Module, args: tuple) -> None:
            part.inputs, part.outputs = _shapes(args[0] if args else None), None
            if part not in self.called:
                self.called.append(part)

        return begin

    def _end(self, part: Part) -> Any:
        def end(module: nn.Module, args: tuple, output: Any) -> None:
            part.outputs = _shapes(output)

        return end

    def explain(self, error: Exception) -> str | None:
        """Explain why the pass stopped within a part of the model; None if it is not for its channels."""
        stopped = [part for part in self.called if part.outputs is None]
        for part in reversed(stopped):
            given = [shape[1] for shape in part.inputs if len(shape) > 1]
            source = self._source(part)
            if given and (text := _explain_channels(part, given, source)):
                return text
        # Anchors and points assert that they have a stride for each map.
        texts = (self._levels(part) for part in self.called) if isinstance(error, AssertionError) else ()
        return next(filter(None, texts), None)

    def warnings(self) -> list[str]:
        """Return a warning for each head whose anchors or points are of other strides than its maps."""
        return [text for part in self.called if (text := self._strides(part))]

    def table(self) -> list[str]:
        """Return one line for each part: channels and strides of the maps that it returned or, of a head, got."""
        lines = []
        for part in self.called:
            is_head = part.key.rstrip('.0123456789').endswith('head')
            shapes = part.inputs if is_head or not part.outputs else part.outputs
            if not _is_pyramid(shapes) or '.loss' in part.key:
                continue
            what = 'returns' if shapes is part.outputs else 'takes'
            if shapes[0][0] == self._images:
                channels = dict.fromkeys(shape[1] for shape in shapes)
                maps = _list(channels if len(channels) == 1 else [shape[1] for shape in shapes])
                maps += f' channels at stride {_list(map(self._stride, shapes))}'
            elif part.key.startswith('model.roi_head'):
                maps = f'{shapes[0][1]} channels of {shapes[0][2]}×{shapes[0][3]} for each region'
            else:  # the layers and queries of a transformer
                continue
            lines.append(f'{part.key} ({type(part.module).__name__}) {what} {maps}')
        return lines

    @property
    def _images(self) -> int:
        return next((part.inputs[0][0] for part in self.called if part.inputs), 0)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the backbone's input, in pixels."""
        for part in self.called:
            if part.inputs and len(part.inputs[0]) == 4:
                return part.inputs[0][2], part.inputs[0][3]
        return None

    def _stride(self, shape: tuple[int, ...]) -> int:
        if self.image_size is None:
            return 0
        height = self.image_size[0]
        powers = [2**i for i in range(10) if math.ceil(height / 2**i) == shape[2]]
        return powers[0] if powers else max(1, round(height / shape[2]))

    def _source(self, part: Part) -> str:
        """The part whose output is this part's input."""
        for other in self.called:
            if other is not part and other.outputs and part.inputs == other.outputs[: len(part.inputs)] != []:
                return other.key
        return 'the part before it'

    def _levels(self, part: Part) -> str | None:
        strides = _declared_strides(part.module)
        if strides is None or len(strides) == len(part.inputs) or not _is_pyramid(part.inputs):
            return None
        return (
            f'{part.key} has anchors or points for {len(strides)} maps, of strides {strides}, but '
            f'{self._source(part)} returns {len(part.inputs)} maps. Set num_outs={len(strides)} of the neck, or as '
            f'many strides in {part.key}.'
        )

    def _strides(self, part: Part) -> str | None:
        strides = _declared_strides(part.module)
        if not strides or not _is_pyramid(part.inputs):
            return None
        real = [self._stride(shape) for shape in part.inputs]
        if len(real) != len(strides) or min(part.inputs[0][2:]) < 4 or 2 / 3 < real[0] / strides[0] < 3 / 2:
            return None  # sizes are rounded
        return (
            f'{part.key} has anchors or points for maps of strides {strides}, but {self._source(part)} returns maps '
            f'of strides {real}: objects would be found badly. Change the strides, or use a neck that reaches them, '
            "such as type='mmevm.UpsampleFPN' with num_upsamples."
        )


def _parts(module: nn.Module, cfg: Any, key: str) -> Iterator[Part]:
    for name, value in cfg.items() if isinstance(cfg, dict) else enumerate(cfg):
        if not isinstance(value, (dict, list, tuple)) or name == 'data_preprocessor':
            continue
        child = module._modules.get(name) if isinstance(name, str) else _item(module, name)
        if isinstance(child, nn.Module):
            if isinstance(value, dict) and 'type' in value:
                yield Part(f'{key}.{name}', child, value)
            yield from _parts(child, value, f'{key}.{name}')


def _item(module: nn.Module, index: int) -> nn.Module | None:
    return module[index] if isinstance(module, (nn.ModuleList, nn.Sequential)) and index < len(module) else None


def _shapes(value: Any) -> list[tuple[int, ...]]:
    if isinstance(value, Tensor):
        return [tuple(value.shape)]
    if isinstance(value, (list, tuple)) and all(isinstance(item, Tensor) for item in value):
        return [tuple(item.shape) for item in value]
    return []


def _list(values: Iterable[Any]) -> str:
    return ', '.join(map(str, values))


def _is_pyramid(shapes: list[tuple[int, ...]]) -> bool:
    return bool(shapes) and all(len(shape) == 4 for shape in shapes)


def _declared_strides(module: nn.Module) -> list[int] | None:
    strides = getattr(getattr(module, 'prior_generator', None), 'strides', None)
    if not isinstance(strides, (list, tuple)):
        return None
    return [int(stride[0] if isinstance(stride, (list, tuple)) else stride) for stride in strides]


def _explain_channels(part: Part, given: list[int], source: str) -> str | None:
    key, wanted = part.key, part.cfg.get('in_channels')
    if 'featmap_strides' in part.cfg and 'out_channels' in part.cfg:  # an extractor keeps the channels of its maps
        key, wanted, name = part.key, part.cfg['out_channels'], 'out_channels'
    else:
        name = 'in_channels'
    if isinstance(wanted, (list, tuple)):
        if sorted(wanted) == sorted(given):  # some necks begin with the last
            return None
        text = f'{key}.{name}={list(wanted)} does not match the channels {given} of the maps that {source} returns.'
        if type_name(part.cfg) == 'FPN' and source == 'model.backbone':
            # From stride 16 to where the FPN of a ResNet begins, whose maps have strides from 4 on.
            upsamples, extra = max(0, 2 - part.cfg.get('start_level', 0)), part.cfg.get('add_extra_convs')
            return (
                f"{text} Replace the neck: {key}=dict(_delete_=True, type='mmevm.UpsampleFPN', in_channels={given}, "
                f'out_channels={part.cfg.get("out_channels")}, num_outs={part.cfg.get("num_outs")}, '
                f'num_upsamples={upsamples}' + (f', add_extra_convs={extra!r})' if extra else ')') + '.'
            )
        return f'{text} Set {key}.{name}={given}.'
    if not isinstance(wanted, int) or wanted in given:
        return None
    if len(set(given)) > 1:
        return (
            f'{key}.{name}={wanted}, but {source} returns maps of {given} channels. Put a neck between the two, such '
            "as type='mmevm.UpsampleFPN'."
        )
    return f'{key}.{name}={wanted}, but {source} returns {given[0]} channels. Set {key}.{name}={given[0]}.'
