"""What runs a model: from a model to a call."""

import contextlib
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

# Of each dtype by name: that of weights and images, and that of autocast.
DTYPES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    'float32': (torch.float32, None),
    'float16': (torch.float16, None),
    'bfloat16': (torch.bfloat16, None),
    'autocast-float16': (torch.float32, torch.float16),
    'autocast-bfloat16': (torch.float32, torch.bfloat16),
}

Call = Callable[[Tensor], Any]


class EngineError(RuntimeError):
    """An engine that cannot run here, or not so; the message says what to do."""


def prepare(
    engine: str,
    model: nn.Module,
    x: Tensor,
    dtype: str = 'float32',
    training: bool = False,
    threads: int | None = None,
    onnx_file: str | Path | None = None,
) -> Call:
    """Make a model ready to be called by an engine.

    Args:
        engine: 'eager'; 'compile', torch.compile; 'cudagraph', eager captured as a CUDA graph; 'onnxruntime';
            'openvino'.
        model: A model, on the device of x and with its dtype; in training mode for ``training``.
        x: What it will be called with, (B, C, H, W). Only eager takes other shapes later.
        dtype: One of ``DTYPES``. The first of its two dtypes is that of the model and of x.
        training: Whether a call is forward and backward of the sum of all outputs in place of forward.
        threads: Threads of ONNX Runtime and OpenVINO; None leaves it to them. PyTorch has ``torch.set_num_threads``.
        onnx_file: Where the ONNX file of the model is or, if it is not there, is written: ONNX Runtime and OpenVINO
            read the same.

    Returns:
        A function of x that computes all outputs. On CUDA it may return before they are there.

    Raises:
        ValueError: If there is no such engine or dtype.
        EngineError: If the engine is not installed, or does not do that; the message says what to do.
    """
    if engine not in ENGINES:
        raise ValueError(f'engine={engine!r} is none of {", ".join(ENGINES)}.')
    if dtype not in DTYPES:
        raise ValueError(f'dtype={dtype!r} is none of {", ".join(DTYPES)}.')
    if engine in ('eager', 'compile', 'cudagraph'):
        autocast = DTYPES[dtype][1]
        precision = (
            partial(torch.autocast, x.device.type, dtype=autocast) if autocast is not None else contextlib.nullcontext
        )
        return ENGINES[engine](model, x, precision, training)
    if training:
        raise EngineError(f'{engine} is for inference: train with eager or compile.')
    if dtype != 'float32':
        raise EngineError(f'{engine} is timed in float32 alone: leave out the dtype {dtype}, or the engine.')
    if onnx_file is None:
        raise ValueError(f'{engine} needs onnx_file, the place of an ONNX file.')
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
        tensors = (out for out in tree_flatten(outputs)[0] if isinstance(out, Tensor) and out.requires_grad)
        loss: Any = sum(out.sum() for out in tensors)
        loss.backward()


def _compile(model: nn.Module, x: Tensor, precision: Callable, training: bool) -> Call:
    import torch._dynamo
    import torch._inductor.config

    # No CUDA graphs within: what they bring is the engine 'cudagraph'.
    mode = 'max-autotune-no-cudagraphs' if x.is_cuda else None
    # Classes that many models share are compiled for each, and dynamo would give up in silence after a few.
    limit = 'recompile_limit' if hasattr(torch._dynamo.config, 'recompile_limit') else 'cache_size_limit'
    with (
        torch._dynamo.config.patch({limit: 1000}),
        torch._inductor.config.patch(freezing=not training),  # weights become constants, which is for inference alone
    ):
        compiled = torch.compile(model, dynamic=False, mode=mode)
        call = _eager(compiled, x, precision, training)  # type: ignore[arg-type]  # of a module it is one
        call(x)
    return call


def _cudagraph(model: nn.Module, x: Tensor, precision: Callable, training: bool) -> Call:
    if not x.is_cuda:
        raise EngineError('cudagraph needs a GPU: give it --device cuda, or take eager or compile.')
    if training:
        raise EngineError('cudagraph captures inference alone: train with eager or compile.')
    call = _eager(model, x, precision, training)
    static_x = x.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up before the capture
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
        raise EngineError(f'This onnxruntime has no {provider}: pip install onnxruntime-gpu in its place.')
    _export(model, x, onnx_file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    # Between calls its threads would spin, and take the cores from what has its turn next.
    options.add_session_config_entry('session.force_spinning_stop', '1')
    # TF32 is off, as in PyTorch here.
    of_provider = {'use_tf32': '0'} if x.is_cuda else {}
    session = onnxruntime.InferenceSession(onnx_file, options, providers=[(provider, of_provider)])
    if provider not in session.get_providers():  # it only warns, and takes the CPU
        raise EngineError(f'onnxruntime could not start its {provider}: see its warning above.')
    (name,) = (put.name for put in session.get_inputs())
    if not x.is_cuda:
        return lambda x: session.run(None, {name: x.numpy(force=True)})

    def run_on_cuda(x: Tensor) -> Any:
        x = x.contiguous()
        binding = session.io_binding()
        binding.bind_input(name, 'cuda', x.get_device(), 'float32', tuple(x.shape), x.data_ptr())
        for put in session.get_outputs():
            binding.bind_output(put.name, 'cuda', x.get_device())
        torch.cuda.current_stream().synchronize()  # the session has a stream of its own
        session.run_with_iobinding(binding)
        return binding.get_outputs()

    return run_on_cuda


def _openvino(model: nn.Module, x: Tensor, threads: int | None, onnx_file: Path) -> Call:
    if x.is_cuda:
        raise EngineError('openvino runs on the CPU here: give it --device cpu, or leave it out.')
    _require('openvino')
    import openvino

    _export(model, x, onnx_file)
    # Without the second it would compute in bfloat16 where a CPU has that.
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
        raise EngineError(f"{package} is not installed: pip install 'mmevm[export]' has it.")


def _export(model: nn.Module, x: Tensor, onnx_file: Path) -> None:
    if not onnx_file.exists():
        from mmevm.deployment.export import export_onnx

        export_onnx(model.cpu(), onnx_file, x.cpu(), dynamic=False)
