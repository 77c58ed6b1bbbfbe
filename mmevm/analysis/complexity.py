"""What a network costs: its parameters, and the multiply-accumulates of one pass.

The counter is mmengine's port of fvcore, which the papers of this field use. It follows each operator of a traced pass
and counts one multiply-accumulate as one FLOP; norms, interpolation and pooling count by element, and activations, sums
and the like not at all. What it has no rule for is listed in place of being zero in silence.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from math import ceil, prod
from typing import Any

import torch
from mmengine.analysis import FlopAnalyzer, parameter_count
from mmengine.analysis.print_helper import complexity_stats_table
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from mmevm.compat import unfused_attention
from mmevm.errors import ConfigError
from mmevm.models.weight_init import pretrained_cfgs
from mmevm.tensors import TensorFunction

if find_spec('mmdet') is not None:  # classification alone needs no MMDetection
    from mmdet.models.roi_heads.roi_extractors import BaseRoIExtractor

    ROI_EXTRACTORS: tuple[type[nn.Module], ...] = (BaseRoIExtractor,)
else:
    ROI_EXTRACTORS = ()

# Arguments by which modules fetch weights while they are built; those of an init_cfg wait for init_weights().
FETCHING = ('pretrained', 'checkpoint_path', 'teacher_ckpt')

POINTWISE, VIEW = 'pointwise', 'view'

# At most a few operations an element, like those that torch itself tags as pointwise or declares as a view: by fvcore's
# convention they cost nothing.
ELEMENTWISE = {
    *('log_softmax', 'softmax', 'hardswish', 'hardswish_', 'prelu', 'silu', 'silu_'),
    *('adaptive_max_pool2d', 'avg_pool2d', 'max_pool2d', 'max_pool2d_with_indices'),
    *('amax', 'amin', 'argmax', 'argmin', 'argsort', 'cumsum', 'mean', 'min', 'sort', 'std', 'sum', 'topk', 'var'),
    *('linalg_vector_norm', 'norm', 'std_mean', 'var_mean'),
    *('clone', 'fill_', 'linspace', 'meshgrid', 'new_ones', 'one_hot', 'ones_like', '_shape_as_tensor'),
    *('im2col', 'index_select', 'pad', 'repeat', 'repeat_interleave', 'scatter', 'tile'),
    *('channel_shuffle', 'pixel_shuffle', 'pixel_unshuffle'),
}


@dataclass(frozen=True)
class Complexity:
    """What one pass of a network costs.

    Attributes:
        input_shape: Shape of the input that was counted, (B, C, H, W).
        params: Parameters, trainable or not.
        flops: Multiply-accumulates of the whole batch.
        by_module: Parameters and multiply-accumulates of each module by name; '' is all.
        by_operator: Multiply-accumulates of each kind of operator.
        elementwise: How often there were operators that cost a few operations an element: not counted, by convention.
        unknown: How often there were operators that the counter has no rule for: their cost is missing in ``flops``.
        uncalled: Modules with parameters that were never called: unused, or used by their owner, where they count.
        regions: How many regions each RoI extractor of a two-stage detector has cut out.
    """

    input_shape: tuple[int, ...]
    params: int
    flops: int
    by_module: dict[str, tuple[int, int]]
    by_operator: dict[str, int]
    elementwise: dict[str, int]
    unknown: dict[str, int]
    uncalled: tuple[str, ...]
    regions: dict[str, int]
    _analyzer: FlopAnalyzer = field(repr=False, compare=False)

    def table(self, depth: int = 2) -> str:
        """Parameters and multiply-accumulates by module.

        Args:
            depth: How far modules within modules are listed; 0 is the whole network alone.
        """
        return complexity_stats_table(self._analyzer, max_depth=depth, show_param_shapes=False)


def measure_complexity(model: nn.Module, inputs: Tensor | Sequence[int]) -> Complexity:
    """Count the parameters of a network and the multiply-accumulates of one pass in eval mode.

    A classifier is counted with its head, a detector up to what its heads put out, without post-processing. The RoI
    heads of a two-stage detector are counted as MMDetection runs them in its 'tensor' mode: the box head on all
    proposals, of which a small image may have fewer than the test settings allow, and the mask head on the first 100.

    Args:
        model: Any module that takes one tensor: a backbone or a model of mmevm, MMDetection, MMPretrain or timm, but
            for its data preprocessor. Its weights do not matter, and its modes are left as they are.
        inputs: What it takes, or the shape of that, (B, C, H, W), to be filled with random numbers.

    Raises:
        ValueError: If the shape is not one of an image, or if the model returns no tensor: what no output depends on
            would not be counted.

    Example:
        >>> from mmevm.analysis.complexity import measure_complexity
        >>> from mmevm.models import EfficientViM
        >>> complexity = measure_complexity(EfficientViM('m1'), (1, 3, 512, 512))
        >>> complexity.params, complexity.flops
        (5713534, 1132029824)
    """
    if not isinstance(inputs, Tensor):
        inputs = _random_input(model, inputs)
    traced = TensorFunction(model)
    analyzer = FlopAnalyzer(traced, (inputs,)).set_op_handle(**_HANDLES)
    analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    # The fused attention of inference is one operator that says nothing of its size.
    with _in_eval_mode(model), _counted_regions(model) as regions, unfused_attention():
        flops = analyzer.by_module()

    params = parameter_count(traced)
    uncounted = {name.removeprefix('aten::'): n for name, n in analyzer.unsupported_ops().items()}
    names = {f'model.{name}'.rstrip('.'): name for name, _ in model.named_modules()}
    return Complexity(
        input_shape=tuple(inputs.shape),
        params=params[''],
        flops=int(flops['']),
        by_module={name: (params[path], int(flops[path])) for path, name in names.items()},
        by_operator={name: int(n) for name, n in analyzer.by_operator().items()},
        elementwise={name: n for name, n in uncounted.items() if _is_elementwise(name)},
        unknown={name: n for name, n in uncounted.items() if not _is_elementwise(name)},
        uncalled=tuple(
            name
            for path, name in names.items()
            if path in analyzer.uncalled_modules() and any(True for _ in model.get_submodule(name).parameters(False))
        ),
        regions=regions,
        _analyzer=analyzer,
    )


def build_without_weights(cfg: Config) -> nn.Module:
    """Build the model of a config with random weights: nothing is read or fetched for it.

    Raises:
        ConfigError: If the config has no model.
    """
    if 'model' not in cfg:
        raise ConfigError(f'{cfg.filename} has no `model`, so there is nothing to build.')
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    return revert_sync_batchnorm(MODELS.build(_without_weights(cfg.model)))


def default_input_size(cfg: Config) -> tuple[tuple[int, int], str]:
    """Height and width of the images that a config tests with, and a phrase that says where they come from."""
    sizes = [size for size in map(_size_after, _test_pipeline(cfg)) if size]
    if sizes:
        return sizes[-1]
    if cfg.get('default_scope') == 'mmdet':
        return (800, 1280), "MMDetection's usual size; the config's test pipeline names none"
    return (224, 224), "the usual size; the config's test pipeline names none"


def padded_size(model: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width that the data preprocessor of a detector makes of an image's."""
    divisor = getattr(getattr(model, 'data_preprocessor', None), 'pad_size_divisor', 1)
    height, width = (ceil(length / divisor) * divisor for length in size)
    return height, width


def _random_input(model: nn.Module, shape: Sequence[int]) -> Tensor:
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f'The input has the shape (B, C, H, W), all of them positive, not {tuple(shape)}.')
    like = next(model.parameters(), torch.empty(0))
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(0)).to(like)


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _counted_regions(model: nn.Module) -> Iterator[dict[str, int]]:
    """Note how many regions each RoI extractor is given."""
    regions: dict[str, int] = {}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, ROI_EXTRACTORS):
                hooks.enter_context(module.register_forward_pre_hook(partial(_note_regions, regions, name)))
        yield regions


def _note_regions(regions: dict[str, int], name: str, extractor: nn.Module, args: tuple) -> None:
    _, rois = args[:2]
    regions[name] = len(rois)


def class_of_operator(name: str) -> str | None:
    """What torch itself tags or declares an operator of ATen as: ``POINTWISE``, ``VIEW``, or None for anything else."""
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet else []
    if any(torch.Tag.pointwise in op.tags for op in overloads):
        return POINTWISE
    aliases = [result.alias_info for op in overloads for result in op._schema.returns if result.alias_info]
    return VIEW if any(not alias.is_write for alias in aliases) else None


def _is_elementwise(name: str) -> bool:
    return name in ELEMENTWISE or class_of_operator(name) is not None


def _shape(value: torch.Value) -> list[int]:
    return value.type().sizes()  # type: ignore[attr-defined]  # of a tensor the type is a TensorType


def _attention(inputs: list[torch.Value], outputs: list[torch.Value]) -> int:
    """Queries by keys, and weights by values."""
    query, key, value = map(_shape, inputs[:3])  # (…, L, E), (…, S, E), (…, S, V)
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _baddbmm(inputs: list[torch.Value], outputs: list[torch.Value]) -> int:
    return prod(_shape(outputs[0])) * _shape(inputs[1])[-1]


def _deformable(weight: int) -> Callable[[list[torch.Value], list[torch.Value]], int]:
    """A convolution's count; the bilinear samples that it is given are not in it."""

    def count(inputs: list[torch.Value], outputs: list[torch.Value]) -> int:
        return prod(_shape(outputs[0])) * prod(_shape(inputs[weight])[1:])

    return count


# Rules for operators with multiply-accumulates that mmengine's counter does not know.
_HANDLES = {
    'aten::scaled_dot_product_attention': _attention,
    'aten::baddbmm': _baddbmm,
    'torchvision::deform_conv2d': _deformable(weight=1),
    'prim::PythonOp.DeformConv2dFunction': _deformable(weight=2),
    'prim::PythonOp.ModulatedDeformConv2dFunction': _deformable(weight=3),
}


def _without_weights(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _without_weights(item) for key, item in value.items() if key not in FETCHING}
        if pretrained_cfgs(kept.get('init_cfg')):
            kept['init_cfg'] = None
        return type(value)(kept)
    return type(value)(map(_without_weights, value)) if isinstance(value, (list, tuple)) else value


def _test_pipeline(cfg: Config) -> Sequence[dict]:
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while 'dataset' in dataset:  # within wrappers
        dataset = dataset['dataset']
    return dataset.get('pipeline') or cfg.get('test_pipeline') or ()


def _size_after(step: dict) -> tuple[tuple[int, int], str] | None:
    """(H, W) of the images that a step of a pipeline puts out; None if that depends on what it is given."""
    kind = getattr(step['type'], '__name__', step['type']).rsplit('.', 1)[-1]
    key = dict(CenterCrop='crop_size', EfficientNetCenterCrop='crop_size', Resize='scale', Pad='size').get(kind)
    size = step.get(key) if key else None
    if size is None:
        return None
    width, height = (size, size) if isinstance(size, int) else size
    if step.get('keep_ratio'):
        if sorted((width, height)) == [800, 1333]:
            return (800, 1280), "MMDetection's usual size where images are resized into (1333, 800)"
        width, height = max(width, height), min(width, height)
    return (height, width), f"of {kind} in the config's test pipeline"
