"""Inference engines: turn a model into a function to time."""

import contextlib
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmevm.errors import EngineError
from mmevm.tensors import flatten_tensors

# dtype of weights and images, and dtype of autocast
DTYPES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    'float32': (torch.float32, None),
    'float16': (torch.float16, None),
    'bfloat16': (torch.bfloat16, None),
    'autocast-float16': (torch.float32, torch.float16),
    'autocast-bfloat16': (torch.float32, torch.bfloat16),
}

Call = Callable[[Tensor], Any]


def prepare(
    engine: str,
    model: nn.Module,
    x: Tensor,
    dtype: str = 'float32',
    training: bool = False,
    threads: int | None = None,
    onnx_file: str | Path | None = None,
) -> Call:
    """Prepare a model for an engine.

    Args:
        engine: One of ``ENGINES``: 'eager'; 'compile' (torch.compile); 'cudagraph' (eager mode captured as a CUDA
            graph); 'onnxruntime'; 'openvino'.
        model: A model with the device and dtype of ``x``, in training mode if ``training``.
        x: Input of the calls, (B, C, H, W). Only eager mode accepts other shapes later.
        dtype: One of ``DTYPES``.
        training: Whether a call runs forward and backward (of the sum of all outputs).
        threads: Threads of ONNX Runtime and OpenVINO; None is their default. Set PyTorch's with
            ``torch.set_num_threads``.
        onnx_file: ONNX file for ONNX Runtime and OpenVINO, exported if it does not exist.

    Returns:
        A function of ``x`` that computes all outputs. On CUDA it may return before the device has finished.

    Raises:
        ValueError: If the engine or dtype is unknown.
        EngineError: If the engine is not installed, or does not support these arguments.
    """
    if engine not in ENGINES:
        raise ValueError(f'engine={engine!r} is not one of {", ".join(ENGINES)}.')
    if dtype not in DTYPES:
        raise ValueError(f'dtype={dtype!r} is not one of {", ".join(DTYPES)}.')
    if engine in ('eager', 'compile', 'cudagraph'):
        autocast = DTYPES[dtype][1]
        precision = (
            partial(torch.autocast, x.device.type, dtype=autocast) if autocast is not None else contextlib.nullcontext
        )
        return ENGINES[engine](model, x, precision, training)
    if training:
        raise EngineError(f'{engine} supports inference only. Use eager or compile for training.')
    if dtype != 'float32':
        raise EngineError(f'{engine} supports float32 only, not {dtype}. Omit that dtype or that engine.')
    if onnx_file is None:
        raise ValueError(f'onnx_file=None, but {engine} needs the path of an ONNX file.')
    return ENGINES[engine](model, x, threads, Path(onnx_file))


def _eager(model: nn.Module, x: Tensor, precision: Callable, training: bool) -> Call:
    return partial(_forward_and_backward if training else _forward, model, precision)


def _forward(model: nn.Module, precision: Callable, x: Tensor) -> Any:
    with torch.no_grad(), precision():
        return model(x)


def _forward_and_backward(model: nn.Module, precision: Callable, x: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    with torch.enable_grad():
        with precision():
            outputs = model(x)
        loss: Any = sum(out.sum() for out in flatten_tensors(outputs) if out.requires_grad)
        loss.backward()


def _compile(model: nn.Module, x: Tensor, precision: Callable, training: bool) -> Call:
    import torch._dynamo
    import torch._inductor.config

    # without CUDA graphs, which the engine 'cudagraph' measures
    mode = 'max-autotune-no-cudagraphs' if x.is_cuda else None
    # The models share classes, and after a few recompilations of one dynamo would silently fall back to eager mode.
    limit = 'recompile_limit' if hasattr(torch._dynamo.config, 'recompile_limit') else 'cache_size_limit'
    with (
        torch._dynamo.config.patch({limit: 1000}),
        torch._inductor.config.patch(freezing=not training),  # treat weights as constants
    ):
        compiled = torch.compile(model, dynamic=False, mode=mode)
        call = _eager(compiled, x, precision, training)  # type: ignore[arg-type]  # a module, as the model
        call(x)
    return call


def _cudagraph(model: nn.Module, x: Tensor, precision: Callable, training: bool) -> Call:
    if not x.is_cuda:
        raise EngineError('cudagraph needs a GPU. Use --device cuda, or the engine eager or compile.')
    if training:
        raise EngineError('cudagraph supports inference only. Use eager or compile for training.')
    call = _eager(model, x, precision, training)
    static_x = x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # let libraries initialize before the capture
        for _ in range(3):
            call(static_x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call(static_x)

    def replay(x: Tensor) -> Any:
        static_x.copy_(x)
        graph.replay()
        return outputs

    return replay


def _onnxruntime(model: nn.Module, x: Tensor, threads: int | None, onnx_file: Path) -> Call:
    _require('onnxruntime')
    import onnxruntime

    provider = 'CUDAExecutionProvider' if x.is_cuda else 'CPUExecutionProvider'
    if provider not in onnxruntime.get_available_providers():
        raise EngineError(f'onnxruntime has no {provider} here. Replace it: pip install onnxruntime-gpu.')
    _export(model, x, onnx_file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    # Otherwise its threads keep spinning after a call and slow down the next model.
    options.add_session_config_entry('session.force_spinning_stop', '1')
    # no TF32, as for PyTorch
    provider_options = {'use_tf32': '0'} if x.is_cuda else {}
    session = onnxruntime.InferenceSession(onnx_file, options, providers=[(provider, provider_options)])
    if provider not in session.get_providers():  # it falls back to the CPU with a warning
        raise EngineError(f'onnxruntime could not start its {provider}. See its warning above.')
    (name,) = (put.name for put in session.get_inputs())
    if not x.is_cuda:
        return lambda x: session.run(None, {name: x.numpy(force=True)})

    def run_on_cuda(x: Tensor) -> Any:
        x = x.contiguous()
        binding = session.io_binding()
        binding.bind_input(name, 'cuda', x.get_device(), 'float32', tuple(x.shape), x.data_ptr())
        for put in session.get_outputs():
            binding.bind_output(put.name, 'cuda', x.get_device())
        torch.cuda.current_stream().synchronize()  # the session uses its own stream
        session.run_with_iobinding(binding)
        return binding.get_outputs()

    return run_on_cuda


def _openvino(model: nn.Module, x: Tensor, threads: int | None, onnx_file: Path) -> Call:
    if x.is_cuda:
        raise EngineError('openvino runs on the CPU only. Use --device cpu, or omit this engine.')
    _require('openvino')
    import openvino

    _export(model, x, onnx_file)
    # By default OpenVINO computes in bfloat16 on CPUs that support it.
    options: dict[str, Any] = {'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_PRECISION_HINT': 'f32'}
    if threads:
        options['INFERENCE_NUM_THREADS'] = threads
    request = openvino.compile_model(onnx_file, 'CPU', options).create_infer_request()
    return lambda x: request.infer([x.numpy(force=True)], share_inputs=True, share_outputs=True).to_tuple()


ENGINES: dict[str, Callable[..., Call]] = dict(
    eager=_eager, compile=_compile, cudagraph=_cudagraph, onnxruntime=_onnxruntime, openvino=_openvino
)


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise EngineError(f"{package} is not installed. Run pip install 'mmevm[export]'.")


def _export(model: nn.Module, x: Tensor, onnx_file: Path) -> None:
    if not onnx_file.exists():
        from mmevm.deployment.export import export_onnx

        export_onnx(model.cpu(), onnx_file, x.cpu(), dynamic=False)
