"""Turn errors of building a run, and of its first iteration, into one line that names the key and what to do."""

import inspect
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mmengine.registry
from mmengine.config import Config
from mmengine.registry import DATASETS, Registry, init_default_scope

from mmevm.errors import ConfigError, UserError

from .config import closest, datasets_of, iter_dicts, string_classes, type_name
from .data import DatasetSummary, compare_with_file, voc_files

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
    except Exception as raised:
        error = hook.error or raised
        explanation = None if hook.finished else hook.explain(error) or explain(error, cfg)
        if explanation is not None:
            raise ConfigError(explanation) from error
        if hook.error is not None:
            raise hook.error from None
        raise


def explain(error: Exception, cfg: Config) -> str | None:
    """Return one line about an error of building a config, or None if the cause is unknown.

    Args:
        error: The error that MMEngine's runner raised.
        cfg: The config.
    """
    message = ' '.join(str(error.args[0] if error.args else error).split())
    frames = traceback.extract_tb(error.__traceback__)
    if found := re.match(r'(\S+) is not in the (?:\w+::)?([\w ]+?) registry', message):
        return _unknown_type(cfg, found[1], found[2])
    if found := re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message):
        return _unknown_argument(cfg, found[1], found[2])
    if found := re.search(r'(\w+)\.__init__\(\) missing \d+ required \S+ arguments?: (.*)', message):
        keys = [key for key, part in iter_dicts(cfg.to_dict()) if type_name(part) == found[1]]
        return f'{_join(keys)}: {found[1]} requires {found[2]}. Set it in the config.' if keys else None
    if any(frame.name == 'build_dataloader' for frame in frames):
        return _dataset_error(cfg)
    if frames and frames[-1].filename.startswith(_PACKAGE) and isinstance(error, (TypeError, ValueError)):
        return _add_key(cfg, message)
    if 'Cannot find None in registry' in message or 'None is not a callable object' in message:
        # MMEngine does not name the missing type of a norm, activation or optimizer.
        names = _registered_names(_registries())
        for key, part in iter_dicts(cfg.to_dict()):
            name = part.get('type')
            if not isinstance(name, str) or not key.startswith(('model.', 'optim_wrapper.')):
                continue
            # a type without a similar name may be one that a class handles itself
            if _find_class(None, part) is None and closest(name, names, cutoff=0.75):
                return _unknown_type(cfg, name)
    return None


def _join(keys: list[str]) -> str:
    return ', '.join(keys[:3]) + (', …' if len(keys) > 3 else '')


def _unknown_type(cfg: Config, name: str, registry_name: str | None = None) -> str | None:
    keys = [f'{key}.type' for key, part in iter_dicts(cfg.to_dict()) if part.get('type') == name]
    if not keys:  # built by the user's own code
        return None
    names = _registered_names([registry for registry in _registries() if registry_name in (registry.name, None)])
    without_scope = [other for other in sorted(names) if other.endswith(f'.{name}')]
    suggestion = without_scope[0] if without_scope else closest(name, names)
    hint = f' Did you mean {suggestion!r}?' if suggestion else ''
    return (
        f'{_join(keys)}={name!r} is not registered.{hint} Correct the name, or import the module that registers it '
        "with custom_imports=dict(imports=['module'])."
    )


def _registries() -> list[Registry]:
    return [value for value in vars(mmengine.registry).values() if isinstance(value, Registry)]


def _registered_names(registries: list[Registry]) -> set[str]:
    """Return all registered names, with and without their scopes."""
    names = {name for registry in registries for name in registry.root.module_dict}
    for registry in registries:
        for scope, child in registry.root.children.items():
            if scope == 'mmevm':
                child.import_from_location()
            names |= {*child.module_dict, *(f'{scope}.{name}' for name in child.module_dict)}
    return names


def _find_class(name: str | None, cfg: dict) -> Any:
    """Return the class of a config's type if it, or a base class, has this name. None matches any name."""
    kind = cfg.get('type')
    candidates = [kind] if isinstance(kind, type) else []
    if isinstance(kind, str):
        for registry in _registries():
            for scoped in (registry.root, *registry.root.children.values()):
                candidates.append(scoped.module_dict.get(kind.rpartition('.')[2]))
    for found in candidates:
        bases = {base.__name__ for base in inspect.getmro(found)} if isinstance(found, type) else set()
        if found is not None and (name is None or name in bases):
            return found
    return None


def _parameters(kind: Any) -> set[str]:
    """Return the arguments of a class, including those of base classes that it passes on as ``**kwargs``."""
    names: set[str] = set()
    for base in inspect.getmro(kind) if isinstance(kind, type) else ():
        if '__init__' not in vars(base):
            continue
        parameters = inspect.signature(vars(base)['__init__']).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names - {'self', 'params'}  # an optimizer's params come from the model


def _unknown_argument(cfg: Config, class_name: str, argument: str) -> str | None:
    holders = [
        (key, part, _find_class(class_name, part)) for key, part in iter_dicts(cfg.to_dict()) if argument in part
    ]
    holders = [holder for holder in holders if holder[2] is not None] or holders
    if not holders:  # passed by the user's own code
        return None
    key, part, kind = holders[0]
    allowed = _parameters(kind)
    foreign = [name for name in part if name not in allowed | {'type', '_scope_', '_delete_'}]
    if allowed and len(foreign) > 1:
        return (
            f'{key} has arguments that {kind.__name__} does not accept: {", ".join(foreign)}. They come from a config '
            f'in _base_. Add _delete_=True to {key} to replace the dict of the base config.'
        )
    keys = _join([f'{key}.{argument}' for key, _, other in holders if other is kind])
    text = f'{keys}: {getattr(kind, "__name__", class_name)} has no argument {argument!r}'
    if allowed:
        suggestion = closest(argument, allowed)
        text += f' (did you mean {suggestion!r}?)' if suggestion else ''
        text += f'; it accepts {", ".join(sorted(allowed))}'
    return f'{text}.'


def _add_key(cfg: Config, message: str) -> str:
    """Complete an error message of mmevm, which starts with ``argument=value``, with the dotted key."""
    if found := re.match(r'(\w+)=', message):
        for key, part in iter_dicts(cfg.to_dict()):
            if found[1] in part and str(part.get('type')).startswith('mmevm.'):
                return f'{key}.{message}'
    return message


def _dataset_error(cfg: Config) -> str | None:
    """Build the datasets one by one to find the one that cannot be built."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    for split in ('train', 'val', 'test'):
        for key, dataset in datasets_of(cfg, split):
            built = None
            try:
                built = DATASETS.build(dict(dataset, serialize_data=False, lazy_init=True))
                built.full_init()
            except UserError as error:
                return str(error)
            except TypeError:  # not a BaseDataset
                continue
            except Exception as error:
                strings = string_classes(cfg, [split]) if isinstance(error, KeyError) else ()
                reason = f'{key} cannot be read: {_reason(error, dataset, built)}'
                return next((text for text in strings if text.startswith(f'{key}.')), reason)
            if not len(built):
                summary = DatasetSummary(key, built, tuple(built.metainfo.get('classes') or ()), 0)
                compare_with_file(summary, training=True)
                return summary.describe_empty()
    return None


def _reason(error: Exception, dataset: dict, built: Any) -> str:
    path = os.path.abspath(os.path.join(dataset.get('data_root') or '', dataset.get('ann_file') or ''))
    if isinstance(error, FileNotFoundError):
        missing = error.filename or str(error)
        absolute = os.path.abspath(missing) if os.path.sep in str(missing) or error.filename else path
        listed = f', which is listed in {path}' if absolute != path and os.path.isfile(path) else ''
        return (
            f'{absolute} does not exist{listed} (the current folder is {os.getcwd()}). Put or link the data there, '
            'pass --data-root DIR, or correct data_root, ann_file and data_prefix.'
        )
    if isinstance(error, KeyError) and path.endswith('.json'):
        return f'{path} has an entry without {error}, which {type_name(dataset)} requires.'
    return f'{_unreadable_xml(built) or path}: {type(error).__name__}: {" ".join(str(error).split())}'


def _unreadable_xml(dataset: Any) -> Path | None:
    """Return the first Pascal VOC file that a dataset cannot read."""
    for file in voc_files(dataset):
        try:
            image = os.path.join(dataset.img_subdir, f'{file.stem}.jpg')
            dataset.parse_data_info(dict(img_id=file.stem, file_name=image, xml_path=str(file)))
        except Exception:
            return file
    return None
