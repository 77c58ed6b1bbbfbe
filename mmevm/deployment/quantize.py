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


def quantize_onnx(
    source: str | os.PathLike,
    target: str | os.PathLike,
    batches: Iterable[np.ndarray],
    float_layers: Sequence[str] = (),
) -> int:
    """Write an int8 version of an ONNX file.

    Args:
        source: A file in float32 with one input.
        target: Where to write. It gets the metadata of the source.
        batches: Calibration images as the file takes them, (B, C, H, W) each.
        float_layers: Names of layers to keep in float32, or patterns with ``*``.

    Returns:
        The number of quantized layers.

    Raises:
        ExportError: If there is no calibration image, or a name in ``float_layers`` fits no layer.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with TemporaryDirectory(prefix='mmevm-quantize-') as folder, _quiet():
        # Folds BatchNorms that deploy mode leaves: those of convolutions that several levels of a pyramid share.
        fused = Path(folder, 'fused.onnx')
        quant_pre_process(os.fspath(source), str(fused), skip_symbolic_shape=True)
        proto = onnx.load(fused)
        layers = layer_names(proto)
        for pattern in float_layers:
            if not any(fnmatch(name, pattern) for name in layers.values()):
                names = ', '.join(dict.fromkeys(layers.values()))
                raise ExportError(f'--float-layers {pattern}: no layer has such a name. Layers: {names}.')
        excluded = [node for node, name in layers.items() if any(fnmatch(name, pattern) for pattern in float_layers)]
        reader = _reader(proto, batches)
        if reader.first is None:
            raise ExportError('--calibration: there are no images to find the ranges of the values.')
        quantize_static(
            str(fused),
            os.fspath(target),
            reader,
            per_channel=True,
            op_types_to_quantize=list(_OPERATORS),
            nodes_to_exclude=excluded,
            # Unsigned values times signed weights, as x86 CPUs multiply them. ReLU becomes part of the clipping.
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    quantized = onnx.load(target)
    metadata = {entry.key: entry.value for entry in onnx.load(source, load_external_data=False).metadata_props}
    del quantized.metadata_props[:]
    onnx.helper.set_model_props(quantized, metadata)
    onnx.save(quantized, target)
    return len(layers) - len(excluded)


def layer_errors(
    source: str | os.PathLike, target: str | os.PathLike, batches: Sequence[np.ndarray]
) -> dict[str, float]:
    """Compare the output of each quantized layer with that of the file in float32.

    Args:
        source: The file in float32.
        target: What :func:`quantize_onnx` wrote.
        batches: A few images, (B, C, H, W) each.

    Returns:
        The signal-to-noise ratio of each layer's output in decibels by the name of the layer, lowest first. The noise
        includes the errors of the layers before it: 20 dB is noise of a tenth of the signal, 40 dB of a hundredth.
    """
    import onnx
    from onnxruntime.quantization import qdq_loss_debug as debug
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with TemporaryDirectory(prefix='mmevm-quantize-') as folder, _quiet():
        fused = Path(folder, 'fused.onnx')
        quant_pre_process(os.fspath(source), str(fused), skip_symbolic_shape=True)
        proto, found = onnx.load(fused), []
        for name, file in (('float.onnx', fused), ('int8.onnx', Path(target))):
            debug.modify_model_output_intermediate_tensors(file, Path(folder, name))
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
            self.name, self.batches = proto.graph.input[0].name, iter(batches)
            self.first = next(self.batches, None)
            self.following = self._follow()

        def _follow(self) -> Iterator[dict[str, np.ndarray]]:
            if self.first is not None:
                yield {self.name: self.first}
            for batch in self.batches:
                yield {self.name: batch}

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.following, None)

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
