"""Count the parameters and the multiply-accumulates (FLOPs) of a network.

The counter is mmengine's port of fvcore, which papers in this field use: one multiply-accumulate is one FLOP; norms,
interpolation and average pooling count a few FLOPs per element, activations and sums none. Operators without a rule are
reported, not silently counted as zero.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
from mmengine.analysis import FlopAnalyzer, parameter_count
from mmengine.analysis.print_helper import complexity_stats_table
from torch import Tensor, nn

from mmevm.compat import unfused_attention
from mmevm.tensors import TensorFunction

from .operators import ELEMENTWISE, LAYOUT, POOLING, SOFTMAX, operator_group

if find_spec('mmdet') is not None:  # classification alone does not need MMDetection
    from mmdet.models.roi_heads.roi_extractors import BaseRoIExtractor

    _ROI_EXTRACTORS: tuple[type[nn.Module], ...] = (BaseRoIExtractor,)
else:
    _ROI_EXTRACTORS = ()

# At most a few operations per element: no FLOPs by fvcore's convention.
_FREE_GROUPS = (ELEMENTWISE, LAYOUT, POOLING, SOFTMAX)


@dataclass(frozen=True)
class Complexity:
    """Parameters and FLOPs of one forward pass.

    Attributes:
        input_shape: Shape of the input, (B, C, H, W).
        params: Parameters, trainable or not.
        flops: Multiply-accumulates of the whole batch.
        by_module: Parameters and multiply-accumulates of each module by name; '' is the whole network.
        by_operator: Multiply-accumulates of each operator.
        elementwise: Calls of operators that cost a few operations per element; not counted, by convention.
        unknown: Calls of operators without a rule: ``flops`` lacks their cost.
        uncalled: Modules with parameters that are never called: unused, or used by their parent and counted there.
        rois: Number of RoIs that each RoI extractor of a two-stage detector received.
    """

    input_shape: tuple[int, ...]
    params: int
    flops: int
    by_module: dict[str, tuple[int, int]]
    by_operator: dict[str, int]
    elementwise: dict[str, int]
    unknown: dict[str, int]
    uncalled: tuple[str, ...]
    rois: dict[str, int]
    _analyzer: FlopAnalyzer = field(repr=False, compare=False)

    def table(self, depth: int = 2) -> str:
        """Return a table of parameters and multiply-accumulates by module.

        Args:
            depth: Levels of nested modules to list; 0 lists the whole network only.
        """
        return complexity_stats_table(self._analyzer, max_depth=depth, show_param_shapes=False)


def measure_complexity(model: nn.Module, inputs: Tensor | Sequence[int]) -> Complexity:
    """Count the parameters of a network and the multiply-accumulates of one forward pass in eval mode.

    A classifier is counted with its head, a detector up to the outputs of its heads, without post-processing. The RoI
    heads of a two-stage detector are counted as MMDetection's 'tensor' mode runs them: the box head on all proposals (a
    small image may have fewer than the test settings allow), the mask head on the first 100.

    Args:
        model: Module that takes one tensor: a backbone or a model of mmevm, MMDetection, MMPretrain or timm. Its data
            preprocessor is skipped; its training modes are restored.
        inputs: The input, or its shape (B, C, H, W) for a random one.

    Raises:
        ValueError: If the shape is not (B, C, H, W), or if the model returns no tensor, as only operators that an
            output depends on are counted.

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
    # nn.MultiheadAttention's fused operator does not expose its matrix products
    with _eval_mode(model), _count_rois(model) as rois, unfused_attention():
        flops = analyzer.by_module()

    params = parameter_count(traced)
    uncounted = {name.removeprefix('aten::'): n for name, n in analyzer.unsupported_ops().items()}
    free = {name for name in uncounted if operator_group(name) in _FREE_GROUPS}
    names = {f'model.{name}'.rstrip('.'): name for name, _ in model.named_modules()}
    return Complexity(
        input_shape=tuple(inputs.shape),
        params=params[''],
        flops=int(flops['']),
        by_module={name: (params[path], int(flops[path])) for path, name in names.items()},
        by_operator={name: int(n) for name, n in analyzer.by_operator().items()},
        elementwise={name: n for name, n in uncounted.items() if name in free},
        unknown={name: n for name, n in uncounted.items() if name not in free},
        uncalled=tuple(
            name
            for path, name in names.items()
            if path in analyzer.uncalled_modules() and list(model.get_submodule(name).parameters(recurse=False))
        ),
        rois=rois,
        _analyzer=analyzer,
    )


def _random_input(model: nn.Module, shape: Sequence[int]) -> Tensor:
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f'inputs={tuple(shape)} is not a shape (B, C, H, W) of positive numbers.')
    like = next(model.parameters(), torch.empty(0))
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(0)).to(like)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _count_rois(model: nn.Module) -> Iterator[dict[str, int]]:
    """Record the number of RoIs that each RoI extractor receives."""
    names = {module: name for name, module in model.named_modules() if isinstance(module, _ROI_EXTRACTORS)}
    rois: dict[str, int] = {}

    def record(extractor: nn.Module, args: tuple) -> None:
        rois[names[extractor]] = len(args[1])

    with ExitStack() as hooks:
        for module in names:
            hooks.enter_context(module.register_forward_pre_hook(record))
        yield rois


def _shape(value: Any) -> list[int]:
    return value.type().sizes()


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """Count the products query·key and weights·value."""
    query, key, value = map(_shape, inputs[:3])  # (…, L, E), (…, S, E), (…, S, V)
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _baddbmm(inputs: list[Any], outputs: list[Any]) -> int:
    return prod(_shape(outputs[0])) * _shape(inputs[1])[-1]


def _deform_conv(weight: int) -> Callable[[list[Any], list[Any]], int]:
    """Count a convolution whose weight is the input of this index; its bilinear sampling is not counted."""
    return lambda inputs, outputs: prod(_shape(outputs[0])) * prod(_shape(inputs[weight])[1:])


# Operators with multiply-accumulates that mmengine's counter has no rule for.
_HANDLES = {
    'aten::scaled_dot_product_attention': _attention,
    'aten::baddbmm': _baddbmm,
    'torchvision::deform_conv2d': _deform_conv(weight=1),
    'prim::PythonOp.DeformConv2dFunction': _deform_conv(weight=2),
    'prim::PythonOp.ModulatedDeformConv2dFunction': _deform_conv(weight=3),
}
