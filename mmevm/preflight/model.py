"""The model of a config, built without memory for its weights: what cannot be built, and channels that do not fit."""

import copy
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import MODELS, Registry
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .arguments import parameters, unknown_argument, unknown_type
from .data import parts
from .errors import ConfigError, some

# Finer than what any level of a pyramid would be reduced to less than a pixel by.
_SIDE = 256
# Of models that would fetch a part of them while they are built.
_FETCHING = ('tokenizer', 'language_model', 'name_or_path', 'teacher_ckpt')
# Extractors that take each region from one level, whose channels they keep.
_SINGLE = ('SingleRoIExtractor', 'mmdet.SingleRoIExtractor')


def check_model(cfg: Config) -> None:
    """Build the model on the meta device, and hand a picture from backbone to neck to heads.

    What fails for another reason than the config, such as an operator without a form for the meta device, is left to
    the run.

    Raises:
        ConfigError: If the model cannot be built, or channels do not fit.
    """
    if 'type' not in cfg.get('model', {}) or _fetches(cfg.model):
        return
    model_cfg = copy.deepcopy(cfg.model)
    if cfg.get('data_preprocessor'):
        model_cfg.setdefault('data_preprocessor', copy.deepcopy(cfg.data_preprocessor))
    keys = {id(part): (key, part) for key, part in parts(model_cfg, 'model')}
    with _quietly(), MODELS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        try:
            with _weights_on_meta():
                model = registry.build(model_cfg)
        except (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            if 'meta' in str(error):
                return
            raise _explain(error, cfg, {key: name for key, (name, _) in keys.items()}) from error
        except Exception:  # of files, the network, the meta device …: the run will tell
            return
        doubts = _check_channels(model.to('meta').eval(), cfg.model)
    for doubt in doubts:
        print_log(doubt, logger='current', level=logging.WARNING)


def _fetches(value: Any) -> bool:
    if isinstance(value, dict):
        return (
            value.get('pretrained') is True
            or any(value.get(key) for key in _FETCHING)
            or any(_fetches(item) for item in value.values())
        )
    return isinstance(value, (list, tuple)) and any(_fetches(item) for item in value)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what the run will say again, and without random numbers that the run would miss."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    # Not `with torch.device('meta')`: models compute on small tensors while they are built, such as linspace of rates.
    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return parameter if parameter is None else nn.Parameter(parameter.to('meta'), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # torch says None only
    try:
        yield
    finally:
        hook.remove()


def _explain(error: Exception, cfg: Config, keys: dict[int, str]) -> ConfigError:
    """Name the dict that was being built, and what is wrong with it."""
    for key, value in cfg.model.items():
        if isinstance(value, tuple) and len(value) == 1:
            return ConfigError(f'model.{key} is a tuple of one: take away the comma behind its last parenthesis.')
    frame = _innermost_build(error)
    if frame is None:
        return ConfigError(f'model: it cannot be built: {_words(error)}')
    part, kind, registry = frame['cfg'], frame.get('obj_cls'), frame.get('registry')
    key = keys.get(id(part)) or _most_alike(part, cfg.model)
    if key.startswith('model.data_preprocessor') and 'data_preprocessor' not in cfg.model:
        key = key.removeprefix('model.')
    if kind is None and isinstance(error, KeyError) and 'type' not in part:
        return ConfigError(f'{key}: it has no type.')
    if kind is None and isinstance(part.get('type'), str) and isinstance(registry, Registry):
        return unknown_type(key, part['type'], registry)
    kind = kind or part.get('type')
    name = getattr(kind, '__name__', kind)
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unexpected and unexpected[1] in part and callable(kind):
        allowed = parameters(kind)
        return unknown_argument(key, unexpected[1], kind, allowed and allowed - {unexpected[1]})
    missing = re.search(r'missing \d+ required .*arguments?: (.*)', str(error))
    if missing:
        return ConfigError(f'{key}: {name} needs {missing[1]}, which the config does not give.')
    return ConfigError(f'{key}: {name} cannot be built: {_words(error)}')


def _words(error: Exception) -> str:
    if isinstance(error, ValueError) and error.args:
        return str(error)
    said = error.args[0] if error.args else traceback.extract_tb(error.__traceback__)[-1].line
    return f'{type(error).__name__}: {said}'


def _innermost_build(error: Exception) -> dict[str, Any] | None:
    """The variables of mmengine's ``build_from_cfg`` where it was nested deepest, or of mmcv's functions like it."""
    names = ('build_from_cfg', 'build_norm_layer', 'build_conv_layer', 'build_padding_layer', 'build_upsample_layer')
    found = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name in names]
    known = [variables for variables in found if isinstance(variables.get('cfg'), dict)]
    if known and 'obj_cls' not in known[-1] and not isinstance(error, KeyError):
        known = [variables for variables in known if 'obj_cls' in variables]
    return known[-1] if known else None


def _most_alike(part: dict, model: dict) -> str:
    """The key of the dict that a copy with some entries added, changed or removed was made of."""
    alike = [
        (sum(other == part.get(name) for name, other in candidate.items()), key)
        for key, candidate in parts(model, 'model')
        if candidate.get('type') == part.get('type')
    ]
    return max(alike, default=(0, 'model'), key=lambda scored: scored[0])[1]


def _check_channels(model: nn.Module, cfg: dict) -> list[str]:
    """Raise an error at what does not fit; return what may be meant, but probably is not."""
    backbone = getattr(model, 'backbone', None)
    if not isinstance(backbone, nn.Module) or not isinstance(cfg.get('backbone'), dict):
        return []
    channels = cfg['backbone'].get('in_channels', 3)
    images = torch.zeros(1, channels if isinstance(channels, int) else 3, _SIDE, _SIDE, device='meta')
    source, maps = 'model.backbone', _maps(_run(backbone, images))
    neck = getattr(model, 'neck', None)
    if maps and isinstance(neck, nn.Module) and cfg.get('neck'):
        necks = cfg['neck'] if isinstance(cfg['neck'], (list, tuple)) else [cfg['neck']]
        modules = neck if isinstance(neck, nn.Sequential) and necks is cfg['neck'] else [neck]
        for i, (module, part) in enumerate(zip(modules, necks, strict=True)):
            key = f'model.neck.{i}' if necks is cfg['neck'] else 'model.neck'
            maps = _hand_on(key, module, part, maps, source)
            source = key
    if not maps:
        return []
    doubts = []
    for name in ('rpn_head', 'bbox_head', 'head'):
        head, part = getattr(model, name, None), cfg.get(name)
        if isinstance(head, nn.Module) and isinstance(part, dict):
            _hand_on(f'model.{name}', head, part, maps, source)
            doubts += _check_levels(f'model.{name}', head, maps, source)
    roi_head = getattr(model, 'roi_head', None)
    if isinstance(roi_head, nn.Module) and isinstance(cfg.get('roi_head'), dict):
        _check_regions(roi_head, cfg['roi_head'], maps, source)
    return doubts


def _run(module: nn.Module, *inputs: Any) -> Any:
    try:
        return module(*inputs)
    except Exception as error:  # the caller looks for a reason in the config, and else leaves it
        return error


def _maps(outs: Any) -> list[Tensor]:
    outs = [outs] if isinstance(outs, Tensor) else outs
    return list(outs) if isinstance(outs, (list, tuple)) and all(isinstance(out, Tensor) for out in outs) else []


def _hand_on(key: str, module: nn.Module, cfg: dict, maps: list[Tensor], source: str) -> list[Tensor]:
    """What a module makes of maps; nothing if it cannot be told here."""
    given = [map.shape[1] if map.ndim > 1 else 0 for map in maps]
    outs = _run(module, tuple(maps))
    wanted = cfg.get('in_channels')
    if isinstance(outs, (AssertionError, RuntimeError, ValueError)) and wanted is not None:
        right: int | list[int]
        if isinstance(wanted, int):
            read = given[-1:] if key.endswith('.head') else given  # a classifier's is of the last map
            fits, right = wanted in read, read[0]
        else:
            fits, right = list(wanted) == given, given
        if not fits:
            several = isinstance(wanted, int) and len(set(given)) > 1 and not key.endswith('.head')
            raise ConfigError(
                f'{key}.in_channels={_plain(wanted)}, but {source} gives {_numbers(given)} channels: '
                + ('put a neck between the two.' if several else f'set {key}.in_channels={right}, or change {source}.')
            )
    return _maps(outs)


def _plain(value: Any) -> Any:
    return value if isinstance(value, int) else list(value)


def _numbers(given: Sequence[int]) -> str:
    if len(given) == 1:
        return f'a map of {given[0]}'
    return f'{len(given)} maps of {given[0] if len(set(given)) == 1 else ", ".join(map(str, given))}'


def _check_levels(key: str, head: nn.Module, maps: list[Tensor], source: str) -> list[str]:
    """Compare the levels of anchors or points with the maps: as many, and, or so it is meant, of the same strides."""
    priors = getattr(head, 'prior_generator', None)
    if priors is None or not isinstance(getattr(priors, 'num_levels', None), int):
        return []
    strides = [stride[0] if isinstance(stride, (list, tuple)) else stride for stride in priors.strides]
    if len(strides) != len(maps):
        raise ConfigError(
            f'{key}: its anchors or points are for {len(strides)} maps, of strides {some(strides, 9)}, but {source} '
            f'gives {len(maps)}: give as many strides, or set num_outs={len(strides)} of the neck.'
        )
    real = [_SIDE // map.shape[-1] for map in maps]
    if real == strides:
        return []
    return [
        f'{key}: its anchors or points are for maps of strides {some(strides, 9)}, but {source} gives maps of strides '
        f'{some(real, 9)}, where objects would be found badly: change the strides, or the neck (such as num_upsamples '
        'of an UpsampleFPN).'
    ]


def _check_regions(roi_head: nn.Module, cfg: dict, maps: list[Tensor], source: str) -> None:
    """Heads of regions, by the channels that their extractor is told to expect and to give."""
    for name in ('bbox', 'mask'):
        extractor = cfg.get(f'{name}_roi_extractor')
        extractors = extractor if isinstance(extractor, (list, tuple)) else [extractor or {}]
        key = f'model.roi_head.{name}_roi_extractor'
        if not all(part.get('type') in _SINGLE for part in extractors):
            continue
        for i, part in enumerate(extractors):
            where = key if extractor is part else f'{key}.{i}'
            levels = part.get('featmap_strides', [])
            if len(levels) > len(maps):
                raise ConfigError(
                    f'{where}.featmap_strides={_plain(levels)} are of {len(levels)} maps, but {source} gives '
                    f'{len(maps)}: name as many at most.'
                )
            given = {map.shape[1] for map in maps[: len(levels)]}
            if given and given != {part.get('out_channels')}:
                raise ConfigError(
                    f'{where}.out_channels={part.get("out_channels")}, but {source} gives maps of '
                    f'{", ".join(map(str, sorted(given)))} channels: set {where}.out_channels={min(given)}.'
                )
        head = cfg.get(f'{name}_head')
        if cfg.get('shared_head') or head is None:
            continue
        for i, part in enumerate(head if isinstance(head, (list, tuple)) else [head]):
            where = f'model.roi_head.{name}_head' + ('' if head is part else f'.{i}')
            module = getattr(roi_head, f'{name}_head', None)
            module = module[i] if isinstance(module, nn.ModuleList) else module
            size = (extractors[0].get('roi_layer') or {}).get('output_size', 7)
            size = size if isinstance(size, (list, tuple)) else (size, size)
            if isinstance(module, nn.Module):
                regions = torch.zeros(1, extractors[0]['out_channels'], *size, device='meta')
                _hand_on_regions(where, module, part, regions, key)


def _hand_on_regions(key: str, module: nn.Module, cfg: dict, regions: Tensor, source: str) -> None:
    wanted, given = cfg.get('in_channels'), regions.shape[1]
    if isinstance(_run(module, regions), RuntimeError) and isinstance(wanted, int) and wanted != given:
        raise ConfigError(
            f'{key}.in_channels={wanted}, but {source}.out_channels={given}: set {key}.in_channels={given}.'
        )
