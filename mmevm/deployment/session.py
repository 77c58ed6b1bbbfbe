"""Run ONNX files in ONNX Runtime and OpenVINO."""

import os
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from mmevm.errors import EngineError

ENGINES = ('onnxruntime', 'openvino')
# What OpenVINO calls them, and the instructions of x86 CPUs that make them faster than float32.
_OPENVINO_PRECISIONS = dict(float32='f32', bfloat16='bf16')
_INSTRUCTIONS = dict(int8=('avx512_vnni', 'avx_vnni', 'amx_int8'), bfloat16=('avx512_bf16', 'amx_bf16'))
_PROVIDERS = dict(cpu='CPUExecutionProvider', cuda='CUDAExecutionProvider')


class OnnxSession:
    """An ONNX file with one input, loaded into an engine.

    Args:
        file: An ONNX file.
        engine: One of ``ENGINES``.
        device: 'cpu' or 'cuda'; None is a GPU if this build of ONNX Runtime supports one, else the CPU. OpenVINO runs
            on the CPU.
        dtype: 'float32' or 'bfloat16', what convolutions and matrix products of float32 tensors are computed in.
            Bfloat16 needs OpenVINO.
        threads: Number of CPU threads; None is the engine's default.

    Attributes:
        input_shape: Length of each dimension of the input; None if it may vary.
        output_names: Names of the outputs.
        metadata: Entries of the file's ``metadata_props``.

    Raises:
        EngineError: If the engine is not installed, does not support the arguments, or cannot load the file. OpenVINO
            compiles int8 files whose image size may vary in the first call of each size, which can raise it, too.
    """

    input_shape: list[int | None]
    output_names: list[str]
    metadata: dict[str, str]

    def __init__(
        self,
        file: str | os.PathLike,
        engine: str = 'onnxruntime',
        device: str | None = None,
        dtype: str = 'float32',
        threads: int | None = None,
    ) -> None:
        check_engine(engine, dtype)
        if not os.path.isfile(file):
            raise EngineError(f'{file}: there is no such file ({os.path.abspath(file)}).')
        if engine == 'onnxruntime':
            self._run = self._load_onnxruntime(file, device, threads)
        else:
            if device not in (None, 'cpu'):
                raise EngineError(f'openvino supports device=cpu only, not {device}. Use onnxruntime.')
            self._run = self._load_openvino(file, dtype, threads)

    def __call__(self, x: np.ndarray) -> list[np.ndarray]:
        """Return the outputs for a batch (B, C, H, W)."""
        return self._run(x)

    def _load_onnxruntime(self, file: str | os.PathLike, device: str | None, threads: int | None) -> Callable:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised; do not log them too
        options.intra_op_num_threads = threads or 0
        # Otherwise its threads keep spinning after a call and slow down whatever runs next.
        options.add_session_config_entry('session.force_spinning_stop', '1')
        providers = _providers(device, onnxruntime.get_available_providers())
        try:
            session = onnxruntime.InferenceSession(os.fspath(file), options, providers=providers)
        except Exception as error:  # its error classes have no common base
            raise EngineError(f'{file} cannot be loaded by ONNX Runtime: {" ".join(str(error).split())}') from error
        (image,) = session.get_inputs()
        self.input_shape = [side if isinstance(side, int) else None for side in image.shape]
        self.output_names = [output.name for output in session.get_outputs()]
        self.metadata = session.get_modelmeta().custom_metadata_map
        return lambda x: session.run(None, {image.name: x})

    def _load_openvino(self, file: str | os.PathLike, dtype: str, threads: int | None) -> Callable:
        import onnx
        import openvino

        if dtype == 'bfloat16' and 'BF16' not in openvino.Core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES'):
            # It would compute in float32 without a word.
            raise EngineError('openvino cannot compute in bfloat16 on this CPU; most need AVX-512. Use float32.')
        options = {
            'PERFORMANCE_HINT': 'LATENCY',
            # By default OpenVINO computes in bfloat16 on CPUs that support it.
            'INFERENCE_PRECISION_HINT': _OPENVINO_PRECISIONS[dtype],
            **({'INFERENCE_NUM_THREADS': threads} if threads else {}),
        }
        try:
            model = openvino.Core().read_model(file)
            proto = onnx.load(file, load_external_data=False)
            self.metadata = {entry.key: entry.value for entry in proto.metadata_props}
            shape = model.inputs[0].get_partial_shape()
            self.input_shape = [side.get_length() if side.is_static else None for side in shape]
            # OpenVINO 2026.4 may add the bias of the first channel to all channels of an int8 layer if the height and
            # width of the image vary.
            per_size = self.metadata.get('precision') == 'int8' and None in self.input_shape[2:]
        except Exception as error:  # openvino raises RuntimeError, onnx protobuf's errors
            raise EngineError(f'{file} cannot be loaded by OpenVINO: {" ".join(str(error).split())}') from error
        load = lru_cache(maxsize=8)(partial(_compile_openvino, file, model, options))
        if not per_size:
            load()  # to see errors now
        self.output_names = [output.name for output in proto.graph.output]
        return lambda x: [output.copy() for output in load(*x.shape[2:] if per_size else ()).infer([x]).to_tuple()]


def _compile_openvino(file: str | os.PathLike, model: Any, options: dict[str, Any], *size: int) -> Any:
    """Compile a model of OpenVINO, for images of this height and width if given; return the request that runs it."""
    import openvino

    try:
        if size:
            model = model.clone()
            batch, channels, *_ = model.inputs[0].get_partial_shape()
            model.reshape(openvino.PartialShape([batch, channels, *size]))
        return openvino.compile_model(model, 'CPU', options).create_infer_request()
    except Exception as error:  # openvino raises RuntimeError
        images = f' for images of {size[0]}×{size[1]}' if size else ''
        raise EngineError(f'{file} cannot be compiled by OpenVINO{images}: {" ".join(str(error).split())}') from error


def check_engine(engine: str, dtype: str = 'float32') -> None:
    """Raise an :class:`EngineError` if an engine is unknown or not installed, or does not compute in ``dtype``."""
    if engine not in ENGINES:
        raise EngineError(f'engine={engine!r} is not one of {", ".join(ENGINES)}.')
    supported = _OPENVINO_PRECISIONS if engine == 'openvino' else ('float32',)
    if dtype not in supported:
        raise EngineError(f'{engine} supports {" and ".join(supported)}, not {dtype}.')
    if find_spec(engine) is None:
        raise EngineError(f"{engine} is not installed. Run pip install 'mmevm[export]'.")


def describe_missing_instructions(precision: str) -> str | None:
    """Return why a precision is not faster than float32 on this CPU; None if it may be, or if that is not known.

    Args:
        precision: 'int8' or 'bfloat16'.
    """
    if not hasattr(torch.cpu, 'get_capabilities'):  # older versions of PyTorch
        return None
    capabilities = torch.cpu.get_capabilities()
    names = _INSTRUCTIONS[precision]
    if capabilities.get('architecture') != 'x86_64' or any(capabilities.get(name) for name in names):
        return None
    cpu = capabilities.get('cpu_name', 'This CPU')
    return (
        f'{cpu} has no instructions for {precision} ({", ".join(names)}), so it will not be faster than float32 here.'
    )


def _providers(device: str | None, available: list[str]) -> list[str]:
    if device is None:
        return [provider for provider in reversed(_PROVIDERS.values()) if provider in available]
    if _PROVIDERS.get(device) not in available:
        raise EngineError(
            f'--device {device}: expected one of {", ".join(k for k, v in _PROVIDERS.items() if v in available)} for '
            'an ONNX file in this build of ONNX Runtime. For an NVIDIA GPU, install onnxruntime-gpu in its place.'
        )
    return [_PROVIDERS[device]]
