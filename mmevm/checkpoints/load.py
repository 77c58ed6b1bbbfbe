"""Weights go into a model, all of them or none: what mmengine only warns of is an error here."""

import re
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from mmevm.errors import CheckpointError
from mmevm.registry import WEIGHT_INITIALIZERS

from .convert import Shapes, StateDict, check_values, differences, flatten_norm, remap_keys, some, state_shapes, unwrap
from .fetch import fetch_checkpoint
from .read import prefix_errors


def load_pretrained(
    module: nn.Module,
    checkpoint: str,
    prefix: str | None = None,
    map_location: str = 'cpu',
    class_dependent: str | None = None,
) -> None:
    """Load a checkpoint into a backbone or a head, every tensor of it.

    Any file that ``convert_checkpoint`` recognises will do as it is, and any other that holds the module's tensors,
    such as one of an architecture of one's own. What it holds beyond the module is not used, and logged.

    Args:
        module: What receives the weights.
        checkpoint: What ``fetch_checkpoint`` takes: a local file, a URL, a ``timm://`` name and more.
        prefix: What the module's names begin with in the file, which may be plain for a backbone; None is 'backbone'.
        map_location: Device on which the file is read.
        class_dependent: Pattern of names whose shapes depend on the number of classes: if that is another one in the
            file, the module keeps what it has, and this is logged.

    Raises:
        CheckpointError: If there is no such file, if it cannot be read, or if a tensor of the module is missing in it
            or has another shape.
    """
    content = fetch_checkpoint(checkpoint, map_location)
    with prefix_errors(checkpoint):
        raw, weights, _ = unwrap(content)
        names = remap_keys(raw)
    state = {name: raw[old] for old, name in names.items()}  # a backbone's plain names now have 'backbone.'
    prefix = (prefix or 'backbone').rstrip('.') + '.'
    received = {
        name.removeprefix(prefix): flatten_norm(name, tensor)
        for name, tensor in state.items()
        if name.startswith(prefix)
    }
    expected = state_shapes(module)
    network = type(module).__name__
    of_classes = [name for name in expected if class_dependent and re.match(class_dependent, name)]
    other_classes = [
        name
        for name in of_classes
        if name in received and received[name].dim() and len(received[name]) != expected[name][0]
    ]
    if other_classes:
        there, here = len(received[other_classes[0]]), expected[other_classes[0]][0]
        print_log(
            f'{checkpoint} knows {there} classes, {network} {here}: its {len(of_classes)} tensors that belong to the '
            f'classes, {some(of_classes)}, start from random weights.',
            logger='current',
        )
        expected = {name: shape for name, shape in expected.items() if name not in of_classes}
    problems = differences(expected, received)
    if problems:
        matched = sum(name in received and tuple(received[name].shape) == shape for name, shape in expected.items())
        raise CheckpointError(
            f'{checkpoint} has {matched} of the {len(expected)} tensors of {network} under the prefix {prefix!r}: '
            f'{"; ".join(problems)}. {_advice(expected, received, raw)} To train from random weights on purpose, set '
            'init_cfg=None (and norm_eval=False of a backbone).'
        )
    received = {name: received[name] for name in expected}
    with prefix_errors(checkpoint):
        check_values(received, _constants(module))
    module.load_state_dict(received, strict=False)  # all that is expected is there

    chosen = f" (its '{weights}' weights)" if weights else ''
    print_log(
        f'{len(expected)} of {len(expected)} tensors of {network} loaded from {checkpoint}{chosen}.', logger='current'
    )
    unused = [name for name in state if not (name.startswith(prefix) and name.removeprefix(prefix) in expected)]
    if unused:
        print_log(
            f'{checkpoint} holds {len(unused)} tensors beyond {network}, not used: {some(unused)}.',
            logger='current',
        )


@WEIGHT_INITIALIZERS.register_module()
class StrictPretrainedInit:
    """mmengine's ``PretrainedInit``, with an error in place of a warning if a tensor is missing.

    Args: as :func:`load_pretrained`, without the module.
    """

    def __init__(self, checkpoint: str, **kwargs: Any) -> None:
        self.checkpoint, self.kwargs = checkpoint, kwargs

    def __call__(self, module: nn.Module) -> None:
        """Load the checkpoint into a module."""
        load_pretrained(module, self.checkpoint, **self.kwargs)


_STATISTICS = ('running_mean', 'running_var')


def _constants(module: nn.Module) -> set[str]:
    """Return the names of buffers that training does not learn: counters, masks, indices."""
    names = (name for name, _ in module.named_buffers(remove_duplicate=False))
    return {name for name in names if not name.endswith(_STATISTICS)}


def _advice(expected: Shapes, received: StateDict, raw: StateDict) -> str:
    if not received:
        return f'The names in the file are {some(raw)}: give their prefix as init_cfg.prefix, or another file.'
    stem = 'patch_embed.conv.0.conv.weight'
    images = received[stem].shape[1:2] if stem in received and stem in expected else None
    if images and images != expected[stem][1:2]:
        return (
            f'The backbone takes images of {expected[stem][1]} channels (in_channels), the pretrained one of '
            f'{images[0]}: adapt the weight of the first convolution in the file, or the images.'
        )
    return 'Make sure that arch is that of the file, and the file complete (tools/convert_checkpoint.py checks it).'


def load_strict(model: nn.Module, checkpoint: str) -> Any:
    """Load what a training has left into a model, every tensor of it.

    Args:
        model: A classifier or detector.
        checkpoint: What ``fetch_checkpoint`` takes: a local file, a URL and more.

    Returns:
        What the file holds, as it was read.

    Raises:
        CheckpointError: If there is no such file, if it cannot be read, or if its names and shapes are not the model's.
    """
    content = fetch_checkpoint(checkpoint)
    model.load_state_dict(check_strict(model, content, checkpoint), strict=False)  # what is not loaded was reported
    tensors = len(state_shapes(model))
    print_log(f'{tensors} of {tensors} tensors of {type(model).__name__} loaded from {checkpoint}.', 'current')
    return content


_MISMATCH = re.compile(
    r'size mismatch for (\S+): copying a param with shape torch\.Size\(\[(.*?)\]\) from checkpoint, '
    r'the shape in current model is torch\.Size\(\[(.*?)\]\)'
)


@dataclass(frozen=True)
class _Trial:
    """What ``load_state_dict`` does with a state dict.

    Attributes:
        total: Number of tensors of the model.
        received: Names of the model's tensors that were written.
        learned: Those of them that are parameters or normalization statistics.
        missing: Names that torch reports as missing.
        unexpected: Names that torch reports as unexpected, after the model has renamed what it renames.
        errors: Tensors that cannot be copied, with the reason.
    """

    total: int
    received: list[str]
    learned: list[str]
    missing: list[str]
    unexpected: list[str]
    errors: list[str]

    def problems(self, constants: set[str]) -> list[str]:
        """Describe which learned tensors are not loaded."""
        missing = [name for name in self.missing if name not in constants]
        problems = [f'{len(missing)} missing ({some(missing)})'] if missing else []
        return problems + ([f'{len(self.errors)} of another shape ({some(self.errors)})'] if self.errors else [])


def _try_loading(model: nn.Module, state: StateDict, checkpoint: str) -> _Trial:
    """Load a state dict, and restore the model.

    Only ``load_state_dict`` knows which names a model accepts: some rename them while loading (hooks and
    ``_load_from_state_dict``, as in mmdet's SemiBaseDetector).

    Raises:
        CheckpointError: If loading fails otherwise than by missing, unexpected or mismatched tensors, or if a learned
            tensor would receive integers, NaN or infinite numbers.
    """
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    before = {name: (tensor.detach().clone(), tensor._version) for name, tensor in own.items()}
    reported: list[tuple[list[str], list[str]]] = []
    hook = model.register_load_state_dict_post_hook(
        lambda _, keys: reported.append((list(keys.missing_keys), list(keys.unexpected_keys)))
    )
    errors = []
    try:
        try:
            model.load_state_dict(state, strict=False)
        except Exception as error:
            if not reported:  # a hook of the model has failed
                reason = ' '.join(str(error).split())
                raise CheckpointError(
                    f'{checkpoint} cannot be loaded into {type(model).__name__} ({type(error).__name__}: {reason}).'
                ) from error
            errors = [
                f'{match[1]}: {_shape(match[3])} expected, {_shape(match[2])} in the file'
                if (match := _MISMATCH.match(line))
                else line
                for line in map(str.strip, str(error).splitlines()[1:])
            ]
        received = [name for name, tensor in own.items() if tensor._version != before[name][1]]
        learned = [name for name in received if isinstance(own[name], nn.Parameter) or name.endswith(_STATISTICS)]
        with prefix_errors(checkpoint):
            check_values(
                {name: state.get(name, own[name]) for name in learned},
                [name for name in learned if not (own[name].is_floating_point() or own[name].is_complex())],
            )
    finally:
        hook.remove()
        with torch.no_grad():
            for name, (tensor, _) in before.items():
                own[name].copy_(tensor)
    missing, unexpected = reported[-1] if reported else ([], [])  # none if the model overrides load_state_dict
    return _Trial(len(own), received, learned, missing, unexpected, errors)


def _shape(numbers: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r'\d+', numbers)))


def check_strict(model: nn.Module, content: Any, checkpoint: str) -> StateDict:
    """Make sure that a file holds all learned tensors of a model, and no others.

    Args:
        model: A classifier or detector.
        content: Of the file.
        checkpoint: Its name, for messages.

    Returns:
        Its tensors by their names.

    Raises:
        CheckpointError: If the model would not receive all of its parameters and normalization statistics, if the file
            holds floating-point tensors that it does not have, or if the numbers are of no use.
    """
    with prefix_errors(checkpoint):
        state, _, _ = unwrap(content)
    trial = _try_loading(model, state, checkpoint)
    constants = _constants(model)
    problems = trial.problems(constants)
    # Others are counters and indices, such as the position_ids that earlier versions of transformers saved.
    if unknown := [name for name in trial.unexpected if name not in state or state[name].is_floating_point()]:
        problems.append(f'{len(unknown)} unknown to the model ({some(unknown)})')
    if problems:
        raise CheckpointError(
            f'{checkpoint} does not fit the model of the config, which has {trial.total} tensors: '
            f'{"; ".join(problems)}. Take the config it was trained with; '
            "a file of the authors' or of timm's goes through tools/convert_checkpoint.py first."
        )
    unloaded = [name for name in trial.missing if not name.endswith('num_batches_tracked')] + trial.unexpected
    if unloaded:
        print_log(
            f'{checkpoint}: {len(unloaded)} buffers are only in the file or only in the model, and not loaded '
            f'({some(unloaded)}).',
            'current',
            WARNING,
        )
    return state


def check_partial(model: nn.Module, content: Any, checkpoint: str) -> None:
    """Log how much of a model starts from a file, whose other tensors are not used.

    Args:
        model: A classifier or detector.
        content: Of the file.
        checkpoint: Its name, for messages.

    Raises:
        CheckpointError: If it has no learned tensor of the model, or numbers that are of no use.
    """
    with prefix_errors(checkpoint):
        state, _, _ = unwrap(content)
    trial = _try_loading(model, state, checkpoint)
    problems = '; '.join(trial.problems(set()))
    if problems and not trial.learned:
        raise CheckpointError(
            f'{checkpoint} has nothing of {type(model).__name__}, which has {trial.total} tensors: {problems}. '
            f"In the file they are called {some(state)}. A file of the authors' or of timm's goes through "
            'tools/convert_checkpoint.py first; weights of the backbone alone are named by its init_cfg.'
        )
    print_log(
        f'{len(trial.received)} of {trial.total} tensors of {type(model).__name__} start from {checkpoint}.'
        + (f' Others keep the weights that they have without it: {problems}.' if problems else ''),
        'current',
        WARNING if problems else INFO,
    )


def load_trained_weights(runner: Runner, checkpoint: str) -> None:
    """Load what a training has left into the model of a runner, every tensor of it.

    Args:
        runner: Whose model receives the weights. Its hooks are told once it starts: EMAHook tells the averaged weights
            from the others then.
        checkpoint: As for :func:`load_strict`, which raises what is wrong with it.
    """
    model = unwrap_model(runner)
    content = load_strict(model, checkpoint)
    if 'state_dict' in content:
        if not _is_of(model, content.get('ema_state_dict')):  # as after mmpretrain's reparameterize_model.py
            del content['ema_state_dict']
            print_log(f'{checkpoint} has an ema_state_dict of another form of the model, which is not used.', 'current')
        runner.register_hook(_LoadedHook(model, content), priority='LOWEST')


def unwrap_model(runner: Runner) -> nn.Module:
    """The model of a runner, without what wraps it among several processes."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model


def _is_of(model: nn.Module, averaged: Any) -> bool:
    """Whether EMAHook finds the model's tensors in what it has saved, or nothing."""
    if not averaged:
        return True
    if not isinstance(averaged, dict):
        return False
    shapes = {
        str(name).removeprefix('module.'): tuple(getattr(tensor, 'shape', ()))
        for name, tensor in averaged.items()
        if name != 'steps'
    }
    return shapes == state_shapes(model)


class _LoadedHook(Hook):
    """Tells the other hooks, once they are ready, of a checkpoint that was loaded before the run."""

    def __init__(self, model: nn.Module, content: dict) -> None:
        self.model = model
        self.content = content

    def before_run(self, runner: Runner) -> None:
        """Let them change what is loaded."""
        runner.call_hook('after_load_checkpoint', checkpoint=self.content)
        self.model.load_state_dict(unwrap(self.content)[0], strict=False)  # load_strict has checked its names
