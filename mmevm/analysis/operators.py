"""Groups of PyTorch operators, for FLOP counts and for time breakdowns."""

import re

import torch

MATRIX_PRODUCTS, CONVOLUTIONS, NORMALIZATION, SOFTMAX = 'matrix products', 'convolutions', 'normalization', 'softmax'
ELEMENTWISE, POOLING, INTERPOLATION, LAYOUT = 'elementwise', 'reductions and pooling', 'interpolation', 'copies, layout'
OTHER = 'other'

# Operators by name without leading and trailing underscores; the first match counts. PyTorch's own tags classify the
# rest: pointwise operators are elementwise, and views change the layout.
_PATTERNS = {
    LAYOUT: r'cat|stack|clone|copy|to(_\w+)?|(\w+_)?pad(_nd|\dd)?|repeat(_interleave)?|tile|roll|flip|index(_select)?|'
    r'scatter|im2col|one_hot|linspace|meshgrid|(new_)?(empty|zeros|ones|full)(_\w+)?|fill|resize|set|\w*shuffle|'
    r'\w*reorder\w*|unsafe_\w+|shape_as_tensor|promote_types|result_type',
    MATRIX_PRODUCTS: r'(\w*_)?(b?add)?b?m[mv](_\w+)?|(\w+_)?linear(_\w+)?|matmul|einsum|dot|\w*attention\w*',
    CONVOLUTIONS: r'\w*conv(?!ert)\w*|nnpack_\w+',
    NORMALIZATION: r'\w*(batch|layer|group|instance|rms)_norm\w*',
    SOFTMAX: r'(log_)?softmax(_\w+)?',
    POOLING: r'\w*pool\dd\w*|a?max|a?min|sum|mean|cumsum|std|var|(std|var)_mean|norm|linalg_vector_norm|'
    r'arg(max|min|sort)|sort|topk',
    INTERPOLATION: r'upsample_\w+|grid_sampler\w*',
    ELEMENTWISE: r'silu|hardswish|hardsigmoid|relu6|prelu|glu|lerp|(native_|feature_)?dropout',
}


def operator_group(name: str) -> str:
    """Return the group of an operator, one of the constants of this module.

    Args:
        name: Name as the profiler or the tracer reports it, with or without the namespace ``aten::``.

    Example:
        >>> from mmevm.analysis.operators import operator_group
        >>> [operator_group(name) for name in ('aten::addmm', 'aten::_softmax', 'aten::mul_', 'aten::fft_fft2')]
        ['matrix products', 'softmax', 'elementwise', 'other']
    """
    name = name.removeprefix('aten::')
    for group, pattern in _PATTERNS.items():
        if re.fullmatch(pattern, name.strip('_')):
            return group
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet else []
    if any(torch.Tag.pointwise in overload.tags for overload in overloads):
        return ELEMENTWISE
    aliases = [result.alias_info for overload in overloads for result in overload._schema.returns if result.alias_info]
    return LAYOUT if any(not alias.is_write for alias in aliases) else OTHER
