"""Weights go into a model, all of them or none: what mmengine only warns of is an error here."""

from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from .converting import Shapes, StateDict, differences, flat_norm, our_names, some, unwrap
from .fetching import fetch_checkpoint
from .reading import CheckpointError


def load_pretrained_backbone(
    backbone: nn.Module, checkpoint: str, prefix: str | None = None, map_location: str = 'cpu'
) -> None:
    """Load a checkpoint into a backbone, every tensor of it.

    Any file that ``convert_checkpoint`` recognises will do as it is, and any other that holds the backbone's tensors,
    such as one of an architecture of one's own. What it holds beyond the backbone is not used, and logged.

    Args:
        backbone: What receives the weights.
        checkpoint: A local file, a URL, a ``timm://`` name or another scheme known to mmengine.
        prefix: What the backbone's names begin with in the file; None is 'backbone.', or nothing where they are plain.
        map_location: Device on which the file is read.

    Raises:
        CheckpointError: If there is no such file, if it cannot be read, or if a tensor of the backbone is missing in
            it or has another shape.
    """
    raw, weights, _ = unwrap(fetch_checkpoint(checkpoint, map_location))
    state = {name: raw[old] for old, name in our_names(raw).items()}  # a backbone's plain names now have 'backbone.'
    prefix = (prefix or 'backbone').rstrip('.') + '.'
    received = {
        name.removeprefix(prefix): flat_norm(name, tensor) for name, tensor in state.items() if name.startswith(prefix)
    }
    expected = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    network = type(backbone).__name__
    problems = differences(expected, received)
    if problems:
        matched = sum(name in received and tuple(received[name].shape) == shape for name, shape in expected.items())
        raise CheckpointError(
            f'{checkpoint} has {matched} of the {len(expected)} tensors of {network} under the prefix {prefix!r}: '
            f'{"; ".join(problems)}. {_advice(expected, received, raw)} To train from random weights on purpose, set '
            'init_cfg=None and norm_eval=False.'
        )
    backbone.load_state_dict({name: received[name] for name in expected})

    chosen = f" (its '{weights}' weights)" if weights else ''
    print_log(
        f'{len(expected)} of {len(expected)} tensors of {network} loaded from {checkpoint}{chosen}.', logger='current'
    )
    unused = [name for name in state if not (name.startswith(prefix) and name.removeprefix(prefix) in expected)]
    if unused:
        print_log(
            f'{checkpoint} holds {len(unused)} tensors beyond the backbone, not used: {some(unused)}.',
            logger='current',
        )


def _advice(expected: Shapes, received: StateDict, raw: StateDict) -> str:
    if not received:
        return f'The names in the file are {some(raw)}: give their prefix as init_cfg.prefix, or another file.'
    stem = 'patch_embed.conv.0.conv.weight'
    if stem in received and stem in expected and received[stem].shape[1:2] != expected[stem][1:2]:
        return (
            f'The backbone takes images of {expected[stem][1]} channels (in_channels), the pretrained one of '
            f'{received[stem].shape[1]}: adapt the weight of the first convolution in the file, or the images.'
        )
    return 'Make sure that arch is that of the file, and the file complete (tools/convert_checkpoint.py checks it).'


def load_trained_weights(runner: Runner, checkpoint: str) -> None:
    """Load what a training has left into the model of a runner, every tensor of it.

    Args:
        runner: Whose model receives the weights; its hooks are told, as EMAHook wants to put the averaged weights in
            place.
        checkpoint: A local file, a URL or another scheme known to mmengine.

    Raises:
        CheckpointError: If there is no such file, if it cannot be read, or if its names and shapes are not the model's.
    """
    content = fetch_checkpoint(checkpoint)
    state, _, _ = unwrap(content)
    if 'state_dict' in content:
        runner.call_hook('after_load_checkpoint', checkpoint=content)
        state, _, _ = unwrap(content)
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = differences(expected, state)
    if unknown := [name for name in state if name not in expected]:
        problems.append(f'{len(unknown)} unknown to the model ({some(unknown)})')
    if problems:
        raise CheckpointError(
            f'{checkpoint} does not fit the model of the config, which has {len(expected)} tensors: '
            f'{"; ".join(problems)}. Take the config it was trained with; '
            "a detector of the authors' goes through tools/convert_checkpoint.py first."
        )
    model.load_state_dict(state)
    print_log(
        f'{len(expected)} of {len(expected)} tensors of {type(model).__name__} loaded from {checkpoint}.', 'current'
    )
