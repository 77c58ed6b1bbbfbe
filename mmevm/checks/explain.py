"""Turn errors of building a run, and of its first iteration, into one line that names the key and what to do."""

import inspect
import os
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import mmengine.registry
from mmengine.config import Config
from mmengine.registry import DATASETS, OPTIMIZERS, Registry, init_default_scope

from mmevm.errors import ConfigError, UserError

from .config import closest, iter_datasets, iter_dicts, preview, skip_failures, type_name
from .data import DatasetSummary, compare_with_file

if TYPE_CHECKING:
    from .hook import CheckHook

_PACKAGE = str(Path(__file__).parents[1])


@contextmanager
def explain_errors(cfg: Config, hook: 'CheckHook') -> Iterator[None]:
    """Explain errors of building a run and of its first iteration. Do not touch later errors.

    Args:
        cfg: The config of the run.
        hook: The registered hook.

    Raises:
        ConfigError: Instead of an error that the config explains.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        explanation = None
        with skip_failures():
            explanation = None if hook.finished else hook.explain(error) or explain(error, cfg)
        if explanation is None:
            raise
        raise ConfigError(explanation) from error


def explain(error: Exception, cfg: Config) -> str | None:
    """Return one line about an error of building a config, or None if the cause is unknown.

    Args:
        error: The error that MMEngine's runner raised.
        cfg: The config.
    """
    message = ' '.join(str(error.args[0] if error.args else error).split())
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    parts = list(iter_dicts(cfg.to_dict()))
    if found := re.match(r'(\S+) is not in the (?:\w+::)?([\w ]+?) registry', message):
        return _unknown_type(parts, found[1], found[2], cfg.get('default_scope'))
    if found := re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message):
        return _unknown_argument(parts, found[1], found[2], _built_class(frames, found[1]))
    if found := re.search(r'(\w+)\.__init__\(\) missing \d+ required \S+ arguments?: (.*)', message):
        keys = [key for key, part in parts if type_name(part) == found[1]]
        return f'{preview(keys, 3)}: {found[1]} requires {found[2]}. Set it in the config.' if keys else None
    if message == 'None is not a callable object':  # MMEngine does not name an unknown optimizer
        names = [part['type'] for key, part in parts if key == 'optim_wrapper.optimizer']
        return _unknown_type(parts, names[0], 'optimizer', None) if names and OPTIMIZERS.get(names[0]) is None else None
    if any(frame.f_code.co_name == 'build_dataloader' for frame in frames):
        return explain_dataset_error(cfg)
    if frames and frames[-1].f_code.co_name == 'stack_batch' and frames[-1].f_locals.get('size'):
        return _larger_than_padding(frames[-1].f_locals)
    if frames and frames[-1].f_code.co_filename.startswith(_PACKAGE) and isinstance(error, (TypeError, ValueError)):
        # Errors of mmevm start with 'argument=value'. Complete them to the dotted key.
        argument = message.partition('=')[0]
        holders = (key for key, part in parts if argument in part and str(part.get('type')).startswith('mmevm.'))
        key = next(holders, None)
        return message if key is None else f'{key}.{message}'
    return None


def _larger_than_padding(found: dict) -> str:
    sizes = [tuple(image.shape[-2:]) for image in found['inputs']]
    largest = tuple(max(size) for size in zip(*sizes, strict=True))
    return (
        f'model.data_preprocessor.size={tuple(found["size"])}, to which MMSegmentation pads images, is smaller than '
        f'images of the batch: up to {largest[0]}×{largest[1]} pixels (height×width) after the pipeline. Set '
        f'size={largest} or more, or resize or crop the images in train_dataloader.dataset.pipeline.'
    )


def _unknown_type(parts: list[tuple[str, dict]], name: str, registry_name: str, scope: str | None) -> str | None:
    keys = [f'{key}.type' for key, part in parts if part.get('type') == name]
    if not keys:  # built by the user's own code
        return None
    names = _registered_names(registry_name, scope)
    with_scope = [other for other in sorted(names) if other.endswith(f'.{name}')]
    suggestion = with_scope[0] if with_scope else closest(name, names)
    hint = f' Did you mean {suggestion!r}?' if suggestion else ''
    return (
        f'{preview(keys, 3)}={name!r} is not registered.{hint} Correct the name, or import the module that registers '
        "it with custom_imports=dict(imports=['module'])."
    )


def _registered_names(registry_name: str, default_scope: str | None) -> set[str]:
    """Return the names in MMEngine's registry of this name, and those of its children with their scopes.

    The names of the default scope's child have none.
    """
    names = set()
    for registry in vars(mmengine.registry).values():
        if isinstance(registry, Registry) and registry.name == registry_name:
            names |= registry.module_dict.keys()
            for scope, child in registry.children.items():
                if scope == 'mmevm':
                    child.import_from_location()
                names |= {name if scope == default_scope else f'{scope}.{name}' for name in child.module_dict}
    return names


def _built_class(frames: list[FrameType], name: str) -> type | None:
    """Return the class that a registry was building if it, or a base class, has this name."""
    kinds = [frame.f_locals.get('obj_cls') for frame in frames if frame.f_code.co_name == 'build_from_cfg']
    kind = kinds[-1] if kinds else None
    return kind if isinstance(kind, type) and name in {base.__name__ for base in kind.__mro__} else None


def _unknown_argument(parts: list[tuple[str, dict]], class_name: str, argument: str, kind: type | None) -> str | None:
    class_name = kind.__name__ if kind else class_name
    holders = [(key, part) for key, part in parts if argument in part]
    holders = [holder for holder in holders if type_name(holder[1]) == class_name] or holders
    if not holders:  # passed by the user's own code
        return None
    key, part = holders[0]
    allowed = _parameters(kind)
    if not allowed:
        return f'{key}.{argument}: {class_name} has no argument {argument!r}.'
    unknown = [name for name in part if name not in allowed | {'type', '_scope_', '_delete_'}]
    if len(unknown) > 1:
        return (
            f'{key} has arguments that {class_name} does not accept: {", ".join(unknown)}. They come from a config in '
            f'_base_. Add _delete_=True to {key} to replace the dict of the base config.'
        )
    suggestion = closest(argument, allowed)
    hint = f' (did you mean {suggestion!r}?)' if suggestion else ''
    accepted = ', '.join(sorted(allowed))
    return f'{key}.{argument}: {class_name} has no argument {argument!r}{hint}; it accepts {accepted}.'


def _parameters(kind: type | None) -> set[str]:
    """Return the arguments of a class and its base classes, to which it may pass them as ``**kwargs``."""
    constructors = [vars(base)['__init__'] for base in (kind.__mro__ if kind else ()) if '__init__' in vars(base)]
    names = {name for constructor in constructors for name in inspect.signature(constructor).parameters}
    return names - {'self', 'args', 'kwargs', 'params'}  # an optimizer's params come from the model


def explain_dataset_error(cfg: Config, splits: Sequence[str] = ('train', 'val', 'test')) -> str | None:
    """Build datasets one by one. Return one line about the first that cannot be built or is empty, or None."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    for split in splits:
        for key, dataset in iter_datasets(cfg, split):
            try:
                built = DATASETS.build(dict(dataset, serialize_data=False, lazy_init=True))
                built.full_init()
            except UserError as error:
                return str(error)
            except TypeError:  # not a BaseDataset
                continue
            except Exception as error:
                return f'{key} cannot be read: {_reason(error, dataset)}'
            if not len(built):
                summary = DatasetSummary(key, built)
                compare_with_file(summary)
                return summary.describe_empty()
    return None


def _reason(error: Exception, dataset: dict) -> str:
    path = os.path.abspath(os.path.join(dataset.get('data_root') or '', dataset.get('ann_file') or ''))
    if isinstance(error, FileNotFoundError) and error.filename:
        return (
            f'{os.path.abspath(error.filename)} does not exist (the current folder is {os.getcwd()}). Put or link the '
            'data there, pass --data-root DIR, or correct data_root, ann_file and data_prefix.'
        )
    if (
        isinstance(error, (IsADirectoryError, ValueError))  # of the JSON parser
        and type_name(dataset).startswith('Coco')
        and not path.endswith('.json')
    ):
        return (
            f'{path} is not a JSON file in COCO format, as ann_file of {type_name(dataset)} must be. Convert labels in '
            'YOLO format, or use XMLDataset for Pascal VOC format (docs/your_data.md).'
        )
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == 'parse_data_info':  # of one of many XML files
            path = frame.f_locals.get('img_info', {}).get('xml_path', path)
    return f'{path}: {type(error).__name__}: {" ".join(str(error).split())}'
