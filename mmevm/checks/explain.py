"""Turn the errors of building a run, and of its first iteration, into one line that names the key and what to do."""

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
from torch.utils.data import DataLoader

from mmevm.errors import ConfigError, UserError

from .config import closest, datasets_of, iter_dicts, string_classes, type_name
from .data import describe_empty, find_unreadable_xml

if TYPE_CHECKING:
    from .hook import CheckHook

_PACKAGE = str(Path(__file__).parents[1])


@contextmanager
def explain_errors(cfg: Config, hook: 'CheckHook') -> Iterator[None]:
    """Explain what goes wrong while a run is built and in its first iteration; later errors pass as they are.

    Args:
        cfg: The config of the run.
        hook: Knows whether the first iteration is over, and what it had reached in the model.

    Raises:
        ConfigError: If the error can be explained by the config, in place of the error.
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
    """Explain an error of building what a config describes.

    Args:
        error: What MMEngine's runner raised.
        cfg: The config.

    Returns:
        One line, or None if the cause is not known.
    """
    message = ' '.join(str(error.args[0] if error.args else error).split())
    frames = traceback.extract_tb(error.__traceback__)
    if found := re.match(r'(\S+) is not in the (?:(\w+)::)?([\w ]+?) registry', message):
        return _unknown_type(cfg, found[1], found[3])
    if found := re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message):
        return _unknown_argument(cfg, found[1], found[2])
    if found := re.search(r'(\w+)\.__init__\(\) missing \d+ required \S+ arguments?: (.*)', message):
        keys = [key for key, part in iter_dicts(cfg.to_dict()) if type_name(part) == found[1]]
        return f'{_names(keys)}: {found[1]} needs {found[2]}, which the config does not give.' if keys else None
    if 'must contain the key "type"' in message:
        return f'A part of the config has no type: {message}'
    if any(frame.name == 'build_dataloader' for frame in frames):
        return _dataset_error(cfg)
    if frames and frames[-1].filename.startswith(_PACKAGE) and isinstance(error, (TypeError, ValueError)):
        return _own_error(cfg, message)  # which is written for the user
    if 'Cannot find None in registry' in message or 'None is not a callable object' in message:  # without a name
        names = _registered_names(_registries())
        for key, part in iter_dicts(cfg.to_dict()):
            name = part.get('type')
            if (
                isinstance(name, str)
                and key.startswith(('model.', 'optim_wrapper.'))
                and _find_class(None, part) is None
            ) and closest(name, names, cutoff=0.75):  # other types are read by their owners
                return _unknown_type(cfg, name)
    return None


def _names(keys: list[str]) -> str:
    return ', '.join(keys[:3]) + (', …' if len(keys) > 3 else '')


def _unknown_type(cfg: Config, name: str, registry_name: str | None = None) -> str | None:
    keys = [f'{key}.type' for key, part in iter_dicts(cfg.to_dict()) if part.get('type') == name]
    if not keys:  # built by the user's own code
        return None
    names = _registered_names([registry for registry in _registries() if registry_name in (registry.name, None)])
    same = [other for other in sorted(names) if other.endswith(f'.{name}')]  # only the scope is missing
    meant = same[0] if same else closest(name, names)
    hint = f' Did you mean {meant!r}?' if meant else ''
    return (
        f'{_names(keys)}={name!r} is not registered.{hint} Correct the name, or import the module that '
        "registers it by custom_imports=dict(imports=['module'])."
    )


def _registries() -> list[Registry]:
    return [value for value in vars(mmengine.registry).values() if isinstance(value, Registry)]


def _registered_names(registries: list[Registry]) -> set[str]:
    """Names of everything registered, with and without its scope."""
    scopes = {child.scope: child for registry in registries for child in registry.root.children.values()}
    if 'mmevm' in scopes:
        scopes['mmevm'].import_from_location()
    names = {other for registry in registries for other in registry.root.module_dict}
    for scope, child in scopes.items():
        names |= {*child.module_dict, *(f'{scope}.{other}' for other in child.module_dict)}
    return names


def _find_class(name: str | None, cfg: dict) -> Any:
    """The class of a config's type if it, or one of its bases, has a name; None for any name."""
    kind = cfg.get('type')
    known = [kind] if isinstance(kind, type) else []
    if isinstance(kind, str):
        for registry in _registries():
            for scoped in (registry.root, *registry.root.children.values()):
                known.append(scoped.module_dict.get(kind.rpartition('.')[2]))
    for found in known:
        bases = {base.__name__ for base in inspect.getmro(found)} if isinstance(found, type) else set()
        if found is not None and (name is None or name in bases):
            return found
    return None


def _parameters(kind: Any) -> set[str]:
    """Names of the arguments of a class, and of its bases as far as it hands on ``**kwargs``."""
    names: set[str] = set()
    for base in inspect.getmro(kind) if isinstance(kind, type) else ():
        if '__init__' not in vars(base):
            continue
        parameters = inspect.signature(vars(base)['__init__']).parameters.values()
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names - {'self', 'params'}  # an optimizer's parameters come from the model


def _unknown_argument(cfg: Config, class_name: str, argument: str) -> str | None:
    holders = [
        (key, part, _find_class(class_name, part)) for key, part in iter_dicts(cfg.to_dict()) if argument in part
    ]
    exact = [holder for holder in holders if holder[2] is not None] or holders
    if not exact:
        return None  # built by the user's own code
    key, part, kind = exact[0]
    if class_name == 'DataLoader':
        kind = DataLoader
    allowed = _parameters(kind)
    keys = _names([f'{key}.{argument}' for key, _, other in exact if other is kind or kind is DataLoader])
    text = f'{keys}: {getattr(kind, "__name__", class_name)} has no argument {argument!r}'
    if allowed:
        meant = closest(argument, allowed)
        text += f' (did you mean {meant!r}?)' if meant else ''
        text += f'; it takes {", ".join(sorted(allowed))}'
        foreign = [name for name in part if name not in allowed | {'type', '_scope_', '_delete_'}]
        if len(foreign) > 1 and kind is not DataLoader:
            return (
                f'{key} has the arguments {", ".join(foreign)}, which {kind.__name__} does not take. They come from a '
                f'config in _base_: add _delete_=True to {key}, so that it replaces the dict of the base config.'
            )
    return f'{text}.'


def _own_error(cfg: Config, message: str) -> str:
    if found := re.match(r'(\w+)=', message):
        for key, part in iter_dicts(cfg.to_dict()):
            if found[1] in part and str(part.get('type')).startswith('mmevm.'):
                return f'{key}.{message}'
    return message


def _dataset_error(cfg: Config) -> str | None:
    """Build one data set after the other, to name the one that cannot be built."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    for split in ('train', 'val', 'test'):
        for key, dataset in datasets_of(cfg, split):
            built = None
            try:
                built = DATASETS.build(dict(dataset, serialize_data=False, lazy_init=True))
                built.full_init()
            except UserError as error:
                return str(error)
            except TypeError:  # not one of MMEngine's data sets
                continue
            except Exception as error:
                strings = string_classes(cfg, [split]) if isinstance(error, KeyError) else ()
                reason = f'{key} cannot be read: {_reason(error, dataset, built)}'
                return next((text for text in strings if text.startswith(f'{key}.')), reason)
            if not len(built):
                return describe_empty(key, built)
    return None


def _reason(error: Exception, dataset: dict, built: Any) -> str:
    root, file = dataset.get('data_root') or '', dataset.get('ann_file') or ''
    path = os.path.abspath(os.path.join(root, file) if file else root)
    if isinstance(error, FileNotFoundError):
        missing = error.filename or str(error)
        absolute = os.path.abspath(missing) if os.path.sep in str(missing) or error.filename else path
        named = f', which {path} names' if absolute != path and os.path.isfile(path) else ''
        return (
            f'there is no {absolute}{named} (the current folder is {os.getcwd()}). Put the data there (a link will '
            'do), name its folder with --data-root DIR, or correct data_root, ann_file and data_prefix.'
        )
    if isinstance(error, KeyError) and path.endswith('.json'):
        return f'{path} has no {error} in one of its entries, which {type_name(dataset)} needs.'
    return f'{find_unreadable_xml(built) or path}: {type(error).__name__}: {" ".join(str(error).split())}'
