"""Inference engines: turn a model into a function to time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmevm.deployment import session
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
    model: nn.Module | None,
    x: Tensor,
    dtype: str = 'float32',
    training: bool = False,
    onnx_file: Path | None = None,
) -> Call:
    """Prepare a model for an engine. Every engine uses as many CPU threads as PyTorch.

    Args:
        engine: One of ``ENGINES``: 'eager'; 'compile' (torch.compile); 'cudagraph' (eager mode captured as a CUDA
            graph); 'onnxruntime'; 'openvino'.
        model: A model with the device and dtype of ``x``, in training mode if ``training``; None if ``onnx_file``
            exists.
        x: Input of the calls, (B, C, H, W). Only eager mode accepts other shapes later. For ONNX Runtime and OpenVINO
            it is in float32 whatever the ``dtype``.
        dtype: One of ``DTYPES``. OpenVINO computes in bfloat16 for both 'bfloat16' and 'autocast-bfloat16'.
        training: Whether a call runs forward and backward (of the sum of all outputs).
        onnx_file: ONNX file for ONNX Runtime and OpenVINO, exported if it does not exist.

    Returns:
        A function of ``x`` that computes all outputs. On CUDA it may return before the device has finished.

    Raises:
        EngineError: If the engine is unknown or not installed, or does not support these arguments.
    """
    if engine not in ENGINES:
        raise EngineError(f'engine={engine!r} is not one of {", ".join(ENGINES)}.')
    if training and engine not in ('eager', 'compile'):
        raise EngineError(f'{engine} supports inference only. Use eager or compile for training.')
    if engine in _TORCH_ENGINES and model is not None:
        return _TORCH_ENGINES[engine](model, x, DTYPES[dtype][1], training)
    if x.is_cuda:
        raise EngineError(f'{engine} is timed on the CPU only, not on {x.device}.')
    onnx_dtype = dtype.removeprefix('autocast-')
    session.check_engine(engine, onnx_dtype)
    if onnx_file is None:
        raise ValueError(f'onnx_file=None, but {engine} needs the path of an ONNX file.')
    if model is not None and not onnx_file.exists():
        from mmevm.deployment.export import export_onnx  # imports onnx

        export_onnx(model, onnx_file, x, dynamic=False)
    onnx_session = session.OnnxSession(onnx_file, engine, 'cpu', onnx_dtype, torch.get_num_threads())
    return lambda x: onnx_session(x.numpy(force=True))


def _eager(model: Callable, x: Tensor, autocast: torch.dtype | None, training: bool) -> Call:
    precision = partial(torch.autocast, x.device.type, dtype=autocast, enabled=autocast is not None)
    return partial(_forward_and_backward if training else _forward, model, precision)


def _forward(model: Callable, precision: Callable, x: Tensor) -> Any:
    with torch.no_grad(), precision():
        return model(x)


def _forward_and_backward(model: Any, precision: Callable, x: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    with torch.enable_grad():
        with precision():
            outputs = model(x)
        loss: Any = sum(out.sum() for out in flatten_tensors(outputs) if out.requires_grad)
        loss.backward()


@contextmanager
def compile_settings(training: bool = False) -> Iterator[None]:
    """Set how torch.compile works in the calls that compile a model."""
    import torch._dynamo
    import torch._inductor.config

    # The models share classes, and after a few recompilations of one dynamo would silently fall back to eager mode.
    limit = 'recompile_limit' if hasattr(torch._dynamo.config, 'recompile_limit') else 'cache_size_limit'
    with (
        torch._dynamo.config.patch({limit: 1000}),
        torch._inductor.config.patch(freezing=not training),  # treat weights as constants
    ):
        yield


def _compile(model: nn.Module, x: Tensor, autocast: torch.dtype | None, training: bool) -> Call:
    with compile_settings(training):
        # without CUDA graphs, which the engine 'cudagraph' measures
        compiled = torch.compile(model, dynamic=False, mode='max-autotune-no-cudagraphs' if x.is_cuda else None)
        call = _eager(compiled, x, autocast, training)
        call(x)
    return call


def _cudagraph(model: nn.Module, x: Tensor, autocast: torch.dtype | None, training: bool) -> Call:
    if not x.is_cuda:
        raise EngineError('cudagraph needs a GPU. Use --device cuda, or the engine eager or compile.')
    call = _eager(model, x, autocast, training)
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


_TORCH_ENGINES: dict[str, Callable[..., Call]] = dict(eager=_eager, compile=_compile, cudagraph=_cudagraph)
ENGINES = (*_TORCH_ENGINES, *session.ENGINES)
