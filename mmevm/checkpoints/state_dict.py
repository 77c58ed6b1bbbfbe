"""Find the state dict in a checkpoint, and compare it with the shapes that a model expects."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from mmevm.errors import CheckpointError

StateDict = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]

# Entries that hold a state dict, and which weights these are. The first one found is the default.
_WRAPPERS = {'model_ema': 'ema', 'state_dict_ema': 'ema', 'model': 'model', 'state_dict': 'model'}


def unwrap(checkpoint: Any, weights: str | None = None) -> tuple[StateDict, str | None, dict[str, str]]:
    """Return the state dict of a checkpoint.

    Args:
        checkpoint: The content of a file: a state dict, or a dict with one under 'model_ema', 'state_dict_ema',
            'model' or 'state_dict'.
        weights: 'ema' or 'model' selects one of several state dicts; None selects 'ema' if the file has both.

    Returns:
        The state dict without DistributedDataParallel's prefix 'module.'; 'ema' or 'model', or None if the file does
        not tell; and the skipped entries with the reason.

    Raises:
        CheckpointError: If the checkpoint is not a dict, or has no such weights, or no tensors.
        ValueError: If ``weights`` is neither of the two.
    """
    if weights not in (None, 'ema', 'model'):
        raise ValueError(f"weights={weights!r} must be 'ema', 'model' or None (EMA weights if the file has them).")
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f'The file holds a {type(checkpoint).__name__}, but a checkpoint is a dict of tensors.')
    found = {
        entry: label
        for entry, label in _WRAPPERS.items()
        if isinstance(value := checkpoint.get(entry), dict) and any(isinstance(item, Tensor) for item in value.values())
    }
    if weights and weights not in found.values():
        raise CheckpointError(
            f"weights='{weights}' is not in the file, which has {preview(found) or 'a single unnamed state dict'}. "
            "Choose the other weights, or don't choose."
        )
    skipped, chosen = {}, None
    if found:
        wrapper = next(entry for entry, label in found.items() if weights in (None, label))
        # A lone 'state_dict' may be either: mmengine's EMAHook puts the averaged weights there.
        chosen = found[wrapper] if len(found) > 1 or wrapper != 'state_dict' else None
        for entry, value in checkpoint.items():
            if entry != wrapper:
                reason = f"'{wrapper}' was chosen" if entry in found else f"not part of '{wrapper}'"
                skipped[entry] = f'{reason} ({_describe(value)})'
        checkpoint = checkpoint[wrapper]
    metadata = getattr(checkpoint, '_metadata', None)  # versions of layers, which load_state_dict reads
    state: StateDict = OrderedDict()
    for name, value in checkpoint.items():
        if isinstance(value, Tensor) and isinstance(name, str):
            state[name] = value.detach()
        else:
            skipped[str(name)] = f'not a named tensor ({_describe(value)})'
    if not state:
        raise CheckpointError(f'The file has no tensors, only {preview(skipped) or "an empty dict"}.')
    if all(name.startswith('module.') for name in state):
        state = OrderedDict((name.removeprefix('module.'), tensor) for name, tensor in state.items())
    if isinstance(metadata, dict) and all(isinstance(layer, dict) for layer in metadata.values()):
        state._metadata = metadata  # type: ignore[attr-defined]
    return state, chosen, skipped


def _describe(value: Any) -> str:
    return f'{len(value)} entries' if isinstance(value, dict | list | tuple) else type(value).__name__


def preview(names: Iterable[str]) -> str:
    """Return the first four names, separated by commas, for a message."""
    names = list(names)
    return ', '.join(names[:4]) + (', …' if len(names) > 4 else '')


def state_shapes(module: nn.Module) -> Shapes:
    """Return the shapes of the tensors in a module's state dict."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}


def find_mismatches(expected: Shapes, state: Mapping[str, Tensor]) -> list[str]:
    """Compare a state dict with the expected shapes; names beyond the expected ones are allowed.

    Returns:
        A description of the missing tensors and one of the tensors with another shape; empty if all are there.
    """
    missing = [name for name in expected if name not in state]
    shapes = {name: (expected[name], tuple(state[name].shape)) for name in expected if name in state}
    return describe_mismatches(missing, {name: pair for name, pair in shapes.items() if pair[0] != pair[1]})


def describe_mismatches(missing: list[str], wrong: dict[str, tuple[tuple, tuple]]) -> list[str]:
    """Describe missing tensors, and those whose shapes (in the model, in the file) differ."""
    problems = [f'{len(missing)} missing ({preview(missing)})'] if missing else []
    if wrong:
        shapes = [f'{name}: {ours} expected, {theirs} in the file' for name, (ours, theirs) in wrong.items()]
        problems.append(f'{len(wrong)} of another shape ({preview(shapes)})')
    return problems


def check_values(state: StateDict, exempt: Iterable[str]) -> None:
    """Refuse integers instead of learned weights, and weights that are NaN or infinite.

    Args:
        state: Tensors to load into a model.
        exempt: Names of tensors that may hold any value, such as counters and masks.

    Raises:
        CheckpointError: If there are such tensors.
    """
    exempt = set(exempt)
    state = {name: tensor for name, tensor in state.items() if name not in exempt}
    integers = [name for name, tensor in state.items() if not (tensor.is_floating_point() or tensor.is_complex())]
    if integers:
        raise CheckpointError(
            f'{len(integers)} tensors are of type {state[integers[0]].dtype} ({preview(integers)}), but floating-point '
            'numbers are expected. Use the file from before quantization.'
        )
    # float: models are float32, in which larger numbers of a float64 file are infinite.
    values = ((name, tensor if tensor.is_complex() else tensor.float()) for name, tensor in state.items())
    infinite = [name for name, tensor in values if not tensor.isfinite().all()]
    if infinite:
        raise CheckpointError(
            f'{len(infinite)} tensors have NaN or infinite values ({preview(infinite)}), as after a training that '
            'diverged. Use an earlier checkpoint.'
        )
