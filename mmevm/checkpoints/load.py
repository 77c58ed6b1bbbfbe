"""Load weights into a model strictly: missing tensors, of which mmengine only warns, are errors."""

import re
from logging import INFO, WARNING
from typing import Any, NamedTuple

import torch
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from mmevm.errors import CheckpointError
from mmevm.registry import WEIGHT_INITIALIZERS

from .convert import flatten_norm, remap_keys
from .fetch import fetch_checkpoint
from .read import prefix_errors
from .state_dict import (
    Shapes,
    StateDict,
    check_values,
    describe_mismatches,
    find_mismatches,
    preview,
    state_shapes,
    unwrap,
)


def load_pretrained(
    module: nn.Module,
    checkpoint: str,
    prefix: str | None = None,
    map_location: str = 'cpu',
    class_dependent: str | None = None,
) -> None:
    """Load every tensor of a backbone or a head from a checkpoint.

    The checkpoint may be any file that ``convert_checkpoint`` recognizes, or any other one with the tensors of the
    module, such as one of a custom architecture. Further tensors of the file are logged and not used.

    Args:
        module: Receives the weights.
        checkpoint: A local file, a URL, a ``timm://`` name or another argument of ``fetch_checkpoint``.
        prefix: Prefix of the module's names in the file; None is 'backbone'. Backbones may also have none in the file.
        map_location: Device on which the file is read.
        class_dependent: Pattern of names whose shapes depend on the number of classes. If the file has another number,
            these tensors keep their values, which is logged.

    Raises:
        CheckpointError: If the file cannot be read, or if a tensor of the module is missing or has another shape.
    """
    content = fetch_checkpoint(checkpoint, map_location)
    with prefix_errors(checkpoint):
        raw, weights, _ = unwrap(content)
        names = remap_keys(raw)
    state = {name: raw[old] for old, name in names.items()}  # names of a plain backbone now begin with 'backbone.'
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
            f'{checkpoint} has {there} classes, but {network} has {here}: its {len(of_classes)} tensors that depend on '
            f'the classes, {preview(of_classes)}, keep their random weights.',
            logger='current',
        )
        expected = {name: shape for name, shape in expected.items() if name not in of_classes}
    problems = find_mismatches(expected, received)
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
    module.load_state_dict(received, strict=False)  # class-dependent tensors may be left out

    chosen = f' ({weights} weights)' if weights else ''
    print_log(f'Loaded {len(expected)}/{len(expected)} tensors of {network} from {checkpoint}{chosen}.', 'current')
    unused = [name for name in state if not (name.startswith(prefix) and name.removeprefix(prefix) in expected)]
    if unused:
        print_log(f'Skipped {len(unused)} other tensors of {checkpoint} ({preview(unused)}).', 'current')


def _advice(expected: Shapes, received: StateDict, raw: StateDict) -> str:
    if not received:
        return f'The names in the file are {preview(raw)}. Set init_cfg.prefix to their prefix, or use another file.'
    stem = 'patch_embed.conv.0.conv.weight'
    channels = received[stem].shape[1:2] if stem in received and stem in expected else None
    if channels and channels != expected[stem][1:2]:
        return (
            f'The backbone expects images with in_channels={expected[stem][1]}, the file has weights for {channels[0]} '
            'channels. Change in_channels, or adapt the weight of the first convolution in the file.'
        )
    return 'Check that arch is that of the file, and that the file is complete (with tools/convert_checkpoint.py).'


@WEIGHT_INITIALIZERS.register_module()
class StrictPretrainedInit:
    """Variant of mmengine's ``PretrainedInit`` that raises an error if a tensor is missing.

    Args:
        checkpoint: See :func:`load_pretrained`.
        **kwargs: Further arguments of :func:`load_pretrained`.
    """

    def __init__(self, checkpoint: str, **kwargs: Any) -> None:
        self.checkpoint, self.kwargs = checkpoint, kwargs

    def __call__(self, module: nn.Module) -> None:
        """Load the checkpoint into a module."""
        load_pretrained(module, self.checkpoint, **self.kwargs)


def load_strict(model: nn.Module, checkpoint: str) -> Any:
    """Load every tensor of a classifier or detector from a checkpoint.

    Args:
        model: Receives the weights.
        checkpoint: A local file, a URL or another argument of ``fetch_checkpoint``.

    Returns:
        The content of the file.

    Raises:
        CheckpointError: If the file cannot be read, or does not fit the model (see :func:`check_strict`).
    """
    content = fetch_checkpoint(checkpoint)
    model.load_state_dict(check_strict(model, content, checkpoint), strict=False)  # differences have been logged
    return content


def check_strict(model: nn.Module, content: Any, checkpoint: str) -> StateDict:
    """Check that a checkpoint has all learned tensors of a model, and no others.

    Args:
        model: A classifier or detector.
        content: Content of the file.
        checkpoint: Name of the file, for messages.

    Returns:
        The state dict of the checkpoint.

    Raises:
        CheckpointError: If parameters or normalization statistics of the model are missing or of another shape, if the
            file has floating-point tensors that the model does not have, or if weights are NaN, infinite or integers.
    """
    state, result = _try_loading(model, content, checkpoint)
    constants = _constants(model)
    problems = describe_mismatches([name for name in result.missing if name not in constants], result.wrong)
    # Other tensors are counters and indices, such as the position_ids that earlier versions of transformers saved.
    if unknown := [name for name in result.unexpected if name not in state or state[name].is_floating_point()]:
        problems.append(f'{len(unknown)} unknown to the model ({preview(unknown)})')
    if problems:
        raise CheckpointError(
            f'{checkpoint} does not fit the model of the config: of {result.total} tensors, {"; ".join(problems)}. Use '
            'the config of the training. Convert files of the authors or timm with tools/convert_checkpoint.py first.'
        )
    print_log(f'Loaded {result.loaded}/{result.total} tensors of {type(model).__name__} from {checkpoint}.', 'current')
    unloaded = [name for name in result.missing if not name.endswith('num_batches_tracked')] + result.unexpected
    if unloaded:
        print_log(
            f'{checkpoint}: {len(unloaded)} constant buffers ({preview(unloaded)}) are only in the file or only in the '
            'model, and were not loaded.',
            'current',
            WARNING,
        )
    return state


def check_partial(model: nn.Module, content: Any, checkpoint: str) -> None:
    """Log how many tensors of a model are in a checkpoint.

    Args:
        model: A classifier or detector.
        content: Content of the file.
        checkpoint: Name of the file, for messages.

    Raises:
        CheckpointError: If the file has no learned tensor of the model, or if weights are NaN, infinite or integers.
    """
    state, result = _try_loading(model, content, checkpoint)
    problems = '; '.join(describe_mismatches(result.missing, result.wrong))
    if problems and not result.learned:
        raise CheckpointError(
            f'{checkpoint} has no tensor of {type(model).__name__}: of {result.total}, {problems}. The names in the '
            f'file are {preview(state)}. Convert files of the authors or timm with tools/convert_checkpoint.py first; '
            "for weights of the backbone alone, use the backbone's init_cfg."
        )
    print_log(
        f'Loaded {result.loaded}/{result.total} tensors of {type(model).__name__} from {checkpoint}.'
        + (f' The others keep their initial weights: {problems}.' if problems else ''),
        'current',
        WARNING if problems else INFO,
    )


class _LoadResult(NamedTuple):
    """Result of ``load_state_dict``.

    Attributes:
        total: Number of tensors of the model.
        learned: Names of the parameters and normalization statistics that were written.
        missing: Names that torch reports as missing.
        unexpected: Names that torch reports as unexpected, after the model has renamed its keys.
        wrong: Names of tensors whose shapes (in the model, in the file) differ.
    """

    total: int
    learned: list[str]
    missing: list[str]
    unexpected: list[str]
    wrong: dict[str, tuple[tuple, tuple]]

    @property
    def loaded(self) -> int:
        """Number of tensors of the model that are in the checkpoint."""
        return self.total - len(self.missing) - len(self.wrong)


_SIZE_MISMATCH = re.compile(
    r'size mismatch for (\S+): copying a param with shape torch\.Size\(\[(.*?)\]\) from checkpoint, '
    r'the shape in current model is torch\.Size\(\[(.*?)\]\)'
)
_STATISTICS = ('running_mean', 'running_var')


def _try_loading(model: nn.Module, content: Any, checkpoint: str) -> tuple[StateDict, _LoadResult]:
    """Load a checkpoint into a model, and restore the model.

    Comparing names is not enough: some models rename keys while loading (hooks and ``_load_from_state_dict``, as in
    mmdet's SemiBaseDetector).

    Returns:
        The state dict of the checkpoint, and what happened.

    Raises:
        CheckpointError: If there are no tensors, if loading fails for other reasons than missing, unexpected or
            mismatched tensors, or if a learned tensor would receive integers, NaN or infinite numbers.
    """
    with prefix_errors(checkpoint):
        state, _, _ = unwrap(content)
    tensors = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    before = {name: (tensor.detach().clone(), tensor._version) for name, tensor in tensors.items()}
    reported: list[tuple[list[str], list[str]]] = []
    hook = model.register_load_state_dict_post_hook(
        lambda _, keys: reported.append((list(keys.missing_keys), list(keys.unexpected_keys)))
    )
    wrong = {}
    try:
        try:
            model.load_state_dict(state, strict=False)
        except Exception as error:
            wrong = {name: (_shape(ours), _shape(theirs)) for name, theirs, ours in _SIZE_MISMATCH.findall(str(error))}
            if not (reported and wrong):  # a hook of the model has failed, or a tensor cannot be copied
                reason = ' '.join(str(error).split())
                raise CheckpointError(
                    f'{checkpoint} cannot be loaded into {type(model).__name__} ({type(error).__name__}: {reason}).'
                ) from error
        received = [name for name, tensor in tensors.items() if tensor._version != before[name][1]]
        learned = [name for name in received if isinstance(tensors[name], nn.Parameter) or name.endswith(_STATISTICS)]
        with prefix_errors(checkpoint):
            check_values(
                {name: state.get(name, tensors[name]) for name in learned},
                [name for name in learned if not (tensors[name].is_floating_point() or tensors[name].is_complex())],
            )
    finally:
        hook.remove()
        with torch.no_grad():
            for name, (tensor, _) in before.items():
                tensors[name].copy_(tensor)
    missing, unexpected = reported[-1] if reported else ([], [])  # none if the model overrides load_state_dict
    return state, _LoadResult(len(tensors), learned, missing, unexpected, wrong)


def _shape(numbers: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r'\d+', numbers)))


def _constants(module: nn.Module) -> set[str]:
    """Return the names of buffers that training does not learn: counters, masks, indices."""
    names = (name for name, _ in module.named_buffers(remove_duplicate=False))
    return {name for name in names if not name.endswith(_STATISTICS)}


def unwrap_model(runner: Runner) -> nn.Module:
    """Return the model of a runner, without the wrapper of distributed training."""
    return runner.model.module if is_model_wrapper(runner.model) else runner.model
