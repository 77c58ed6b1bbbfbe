"""Types and arguments of what mmengine's runner builds by itself, so that a typing error does not wait for its turn.

The model is not among them: it is built for a trial (``model.py``).
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    EVALUATOR,
    HOOKS,
    LOG_PROCESSORS,
    LOOPS,
    METRICS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    TRANSFORMS,
    VISBACKENDS,
    VISUALIZERS,
    Registry,
)
from torch.utils.data import DataLoader

from .errors import ConfigError, nearest

# What mmengine takes out of a dict before the rest become arguments.
_TAKEN_OUT = {
    HOOKS: {'priority'},
    PARAM_SCHEDULERS: {'convert_to_iter_based'},
    # The rest of an optimizer wrapper's dict is the optimizer, and how its parameters are grouped.
    OPTIM_WRAPPERS: {'optimizer', 'constructor', 'paramwise_cfg'},
}
_LOADER = {'dataset', 'sampler', 'batch_sampler', 'collate_fn', 'worker_init_fn', 'num_batch_per_epoch'}


def check_arguments(cfg: Config, splits: Sequence[str]) -> None:
    """Make sure that types exist and take the arguments they are given, in all that the runner builds but the model.

    Args:
        cfg: A config for mmengine's runner.
        splits: Those of 'train', 'val' and 'test' that are about to be used.

    Raises:
        ConfigError: If a type is not registered, or an argument is none of its.
    """
    scope = cfg.get('default_scope')
    for key, part, registry in _parts(cfg, splits):
        if 'type' not in part:
            continue
        kind = resolve(key, part, registry, scope)
        if kind is not None:
            check_names(key, part, kind, _TAKEN_OUT.get(registry, set()))


def resolve(key: str, part: dict, registry: Registry, scope: str | None) -> Callable | None:
    """The class or function of a dict's type; None if it cannot be known here.

    Raises:
        ConfigError: If the type is not registered.
    """
    if not isinstance(part['type'], str):
        return part['type'] if callable(part['type']) else None
    with registry.switch_scope_and_registry(part.get('_scope_') or scope) as scoped:
        try:
            kind = scoped.get(part['type'])
        except ImportError:  # of a package that is not there, which building says better
            return None
        if kind is None:
            raise unknown_type(key, part['type'], scoped)
        return kind


def unknown_type(key: str, name: str, registry: Registry) -> ConfigError:
    """The error of a type that is not registered, with the name next to it among those that are."""
    scope, children = name.rpartition('.')[0], registry.root.children
    if 'mmevm' in children:
        children['mmevm'].import_from_location()
    scoped = {f'{child}.{other}' for child in children for other in children[child].module_dict}
    same = [other for other in scoped if other.endswith(f'.{name}')]  # the scope was forgotten
    names = scoped if scope in children else {other for known in _ancestry(registry) for other in known.module_dict}
    meant = f' (did you mean {same[0]!r}?)' if same else nearest(name, names)
    return ConfigError(
        f'{key}.type={name!r} is not registered{meant}: correct the name, or import the module that registers it by '
        'custom_imports=dict(imports=[…]).'
    )


def check_names(key: str, part: dict, kind: Callable, taken_out: set[str]) -> None:
    """Make sure that every entry of a dict is an argument of what it builds.

    Raises:
        ConfigError: If one is not.
    """
    allowed = parameters(kind)
    if allowed is None:
        return
    for name in part:
        if name not in allowed | taken_out | {'type', '_scope_'}:
            raise unknown_argument(key, name, kind, allowed | taken_out)


def unknown_argument(key: str, name: str, kind: Callable, allowed: set[str] | None) -> ConfigError:
    """The error of an argument that a class does not have."""
    takes = f'; it takes {", ".join(sorted(allowed))}' if allowed else ''
    return ConfigError(f'{key}.{name}: {kind.__name__} has no argument {name!r}{nearest(name, allowed or ())}{takes}.')


def parameters(kind: Callable) -> set[str] | None:
    """Names of all arguments of a class or function; None if it takes any.

    Where a class hands ``**kwargs`` on, the next one of its bases is asked too.
    """
    bases = inspect.getmro(kind) if isinstance(kind, type) else ()
    inits = [vars(base)['__init__'] for base in bases if '__init__' in vars(base)] or [kind]
    names: set[str] = set()
    for init in inits:
        try:
            signature = inspect.signature(init).parameters
        except (TypeError, ValueError):
            return None
        kinds = {parameter.kind for parameter in signature.values()}
        names |= {name for name, p in signature.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            return names - {'self'}
    return None


def _ancestry(registry: Registry) -> Iterator[Registry]:
    while registry is not None:
        yield registry
        registry = registry.parent


def _parts(cfg: Config, splits: Sequence[str]) -> Iterator[tuple[str, dict, Registry]]:
    """Dicts that become objects by a registry, with their keys."""
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        if isinstance(loader, dict):
            key = f'{split}_dataloader'
            check_names(key, loader, DataLoader, _LOADER)
            yield from _dataset(loader.get('dataset'), f'{key}.dataset')
            for name in ('sampler', 'batch_sampler'):
                yield from _each(loader.get(name), f'{key}.{name}', DATA_SAMPLERS)
        evaluator = cfg.get(f'{split}_evaluator')
        if isinstance(evaluator, dict) and evaluator.get('type', 'Evaluator').endswith('Evaluator'):
            yield from _each(evaluator if 'type' in evaluator else None, f'{split}_evaluator', EVALUATOR)
            yield from _each(evaluator.get('metrics'), f'{split}_evaluator.metrics', METRICS)
        else:
            yield from _each(evaluator, f'{split}_evaluator', METRICS)
        yield from _each(cfg.get(f'{split}_cfg'), f'{split}_cfg', LOOPS)
    if 'train' in splits:
        yield from _optimizing(cfg)
    for name, hook in (cfg.get('default_hooks') or {}).items():
        yield from _each(hook, f'default_hooks.{name}', HOOKS)
    yield from _each(cfg.get('custom_hooks'), 'custom_hooks', HOOKS)
    visualizer = cfg.get('visualizer')
    yield from _each(visualizer, 'visualizer', VISUALIZERS)
    if isinstance(visualizer, dict):
        yield from _each(visualizer.get('vis_backends'), 'visualizer.vis_backends', VISBACKENDS)
    yield from _each(cfg.get('log_processor'), 'log_processor', LOG_PROCESSORS)


def _optimizing(cfg: Config) -> Iterator[tuple[str, dict, Registry]]:
    wrapper = cfg.get('optim_wrapper')
    if isinstance(wrapper, dict) and 'constructor' not in wrapper:  # one that reads what it likes
        yield from _each({'type': 'OptimWrapper', **wrapper}, 'optim_wrapper', OPTIM_WRAPPERS)
        yield from _each(wrapper.get('optimizer'), 'optim_wrapper.optimizer', OPTIMIZERS)
    elif isinstance(wrapper, dict) and isinstance(wrapper['constructor'], str):
        constructor = dict(type=wrapper['constructor'])
        yield 'optim_wrapper.constructor', constructor, OPTIM_WRAPPER_CONSTRUCTORS
    schedulers = cfg.get('param_scheduler')
    if not (isinstance(schedulers, dict) and 'type' not in schedulers):  # one for each of several optimizers
        yield from _each(schedulers, 'param_scheduler', PARAM_SCHEDULERS)


def _each(value: Any, key: str, registry: Registry) -> Iterator[tuple[str, dict, Registry]]:
    if isinstance(value, dict):
        yield key, value, registry
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _each(item, f'{key}.{i}', registry)


def _dataset(dataset: Any, key: str) -> Iterator[tuple[str, dict, Registry]]:
    yield from _each(dataset, key, DATASETS)
    if isinstance(dataset, dict):
        yield from _each(dataset.get('pipeline'), f'{key}.pipeline', TRANSFORMS)
        yield from _dataset(dataset.get('dataset'), f'{key}.dataset')
        yield from _dataset(dataset.get('datasets'), f'{key}.datasets')
    elif isinstance(dataset, (list, tuple)):
        for i, item in enumerate(dataset):
            if isinstance(item, dict):
                yield from _each(item.get('pipeline'), f'{key}.{i}.pipeline', TRANSFORMS)
