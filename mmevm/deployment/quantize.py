"""Quantize ONNX files to int8 with ONNX Runtime, and find the layers that lose accuracy.

Convolutions and fully connected layers compute in int8, with a scale for each channel of the weights and one for each
input. All else stays in float32: LayerNorm, softmax, the gates and the two products of tokens and hidden states in
HSM-SSD (Eq. 10 of the paper), other activations than ReLU, and the post-processing of detectors. Scales of inputs come
from the smallest and largest value on calibration images.

Files are in the QDQ format (QuantizeLinear and DequantizeLinear around each layer), which ONNX Runtime and OpenVINO
fuse into layers of int8.
"""

import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from mmevm.errors import ExportError

if TYPE_CHECKING:
    import onnx

# ReLU is part of the convolution before it.
_OPERATORS = ('Conv', 'Gemm', 'Relu')


def fuse_layers(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Fold the BatchNorms that deploy mode leaves: those of convolutions that several levels of a pyramid share.

    Args:
        source: A file in float32.
        target: Where to write the same function. ONNX Runtime adds an entry ``onnx.…`` to its metadata.
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with _quiet():
        quant_pre_process(os.fspath(source), os.fspath(target), skip_symbolic_shape=True)


def quantize_onnx(
    source: str | os.PathLike,
    target: str | os.PathLike,
    batches: Iterable[np.ndarray],
    float_layers: Sequence[str] = (),
) -> int:
    """Write an int8 version of an ONNX file.

    Args:
        source: A file in float32 with one input, after :func:`fuse_layers`.
        target: Where to write. It gets the metadata of the source, without ONNX Runtime's entry.
        batches: Calibration images as the file takes them, (B, C, H, W) each, at least one.
        float_layers: Names of layers to keep in float32, or patterns with ``*``.

    Returns:
        The number of quantized layers.

    Raises:
        ExportError: If a name in ``float_layers`` fits no layer.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static

    proto = onnx.load(source)
    layers = layer_names(proto)
    for pattern in float_layers:
        if not any(fnmatch(name, pattern) for name in layers.values()):
            names = ', '.join(dict.fromkeys(layers.values()))
            raise ExportError(f'--float-layers {pattern}: no layer has such a name. Layers: {names}.')
    excluded = [node for node, name in layers.items() if any(fnmatch(name, pattern) for pattern in float_layers)]
    with _quiet():
        quantize_static(
            os.fspath(source),
            os.fspath(target),
            _reader(proto, batches),
            per_channel=True,
            op_types_to_quantize=list(_OPERATORS),
            nodes_to_exclude=excluded,
            # Unsigned values times signed weights, as x86 CPUs multiply them. ReLU becomes part of the clipping.
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    quantized = onnx.load(target)
    entries = {entry.key: entry.value for entry in proto.metadata_props if not entry.key.startswith('onnx.')}
    onnx.helper.set_model_props(quantized, entries)
    onnx.save(quantized, target)
    return len(layers) - len(excluded)


def layer_errors(
    source: str | os.PathLike, target: str | os.PathLike, batches: Sequence[np.ndarray]
) -> dict[str, float]:
    """Compare the output of each quantized layer with that of the file in float32.

    Args:
        source: What :func:`fuse_layers` wrote.
        target: What :func:`quantize_onnx` made of it.
        batches: A few images, (B, C, H, W) each.

    Returns:
        The signal-to-noise ratio of each layer's output in decibels by the name of the layer, lowest first. The noise
        includes the errors of the layers before it: 20 dB is noise of a tenth of the signal, 40 dB of a hundredth.
    """
    import onnx
    from onnxruntime.quantization import qdq_loss_debug as debug

    proto, found = onnx.load(source), []
    with TemporaryDirectory(prefix='mmevm-quantize-') as folder, _quiet():
        for name, file in (('float.onnx', source), ('int8.onnx', target)):
            debug.modify_model_output_intermediate_tensors(Path(file), Path(folder, name))
            found.append(debug.collect_activations(str(Path(folder, name)), _reader(proto, batches)))
        matches = debug.create_activation_matching(found[1], found[0])
    layers = layer_names(proto)
    producers = {
        output: layers[node.name] for node in proto.graph.node for output in node.output if node.name in layers
    }
    for node in proto.graph.node:  # the output of a layer with ReLU is that of the ReLU
        if node.op_type == 'Relu' and node.input[0] in producers:
            producers[node.output[0]] = producers[node.input[0]]
    errors: dict[str, float] = {}
    for tensor, match in matches.items():
        if tensor in producers and match.get('float') is not None:
            ratio = debug.compute_signal_to_quantization_noice_ratio(match['float'], match['post_qdq'])
            name = producers[tensor]
            errors[name] = min(ratio, errors.get(name, math.inf))  # several levels may share a layer
    return dict(sorted(errors.items(), key=lambda item: item[1]))


def layer_names(proto: 'onnx.ModelProto') -> dict[str, str]:
    """Return the layers that are quantized: from names of nodes to names of modules, as in a state dict."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    layers: dict[str, str] = {}
    for node in proto.graph.node:
        if node.op_type in _OPERATORS[:2] and node.input[1] in weights:
            name = re.sub(r'^ConvBnFusion_W_|_token_\d+$', '', node.input[1])  # added by ONNX Runtime
            layers[node.name] = re.sub(r'^(model\.)+|\.weight$', '', name)
    return layers


def _reader(proto: 'onnx.ModelProto', batches: Iterable[np.ndarray]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.inputs = ({proto.graph.input[0].name: batch} for batch in batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.inputs, None)

    return Reader()


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the advice that ONNX Runtime logs during a quantization."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
