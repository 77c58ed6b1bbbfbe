"""Export a model to ONNX and verify the file against PyTorch before writing it.

An exporter follows one forward pass. If it takes something for a constant there, such as the batch size or a branch
that depends on it, the file is wrong for other images only. Each file is therefore run in ONNX Runtime on images of
other sizes and batch sizes than those of the export, and compared with PyTorch.

The exporter is PyTorch's newer one, based on ``torch.export``. The older one, based on TorchScript, writes the batch
size into the file as a constant, and cannot export deploy mode.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from mmevm.errors import EngineError, ExportError
from mmevm.tensors import TensorFunction

from . import nms
from .session import OnnxSession

if TYPE_CHECKING:
    import onnx

TOLERANCE = 1e-3  # largest accepted difference from PyTorch, relative to the largest value of an output
OPSET = 18  # the oldest that PyTorch's exporter writes; LayerNorm is one operator from 17 on
PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
DYNAMIC = {0: 'batch', 2: 'height', 3: 'width'}

# From the outputs of a file and those of PyTorch to how much each differs.
Compare = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[float]]


def export_onnx(
    model: nn.Module,
    file: str | os.PathLike,
    example: Tensor,
    dynamic: bool = True,
    size_divisor: int = 1,
    output_names: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    opset: int = OPSET,
    reference: nn.Module | None = None,
    compare: Compare | None = None,
    constants: Mapping[str, float] | None = None,
    check: Callable[[Path], float] | None = None,
) -> float:
    """Export a model to ONNX, verify it in ONNX Runtime and write the file.

    The input of the file is called ``image``. If anything fails, ``file`` stays as it was.

    Args:
        model: In eval mode. It maps one tensor to tensors, possibly nested; the file returns them in order.
        file: Where to write. It contains the weights, so the model must be smaller than 2 GB.
        example: Images, (B, C, H, W), as the model takes them; the file is verified on noise of the same standard
            deviation. With ``dynamic``, B, H and W must be greater than 1, and
            those of every map within the model should be: the exporter takes a 1 for a constant.
        dynamic: Whether the file accepts any B, H and W. If not, it accepts those of the example, which may have any
            shape.
        size_divisor: What H and W must be multiples of. With ``dynamic``, the file is verified at such sizes only.
        output_names: Names of the outputs, in order; None is ``output_0`` and so on.
        metadata: Further entries of the file's ``metadata_props``.
        opset: Version of ONNX's operators, at least 18.
        reference: What the file must agree with, such as the model before it was switched to deploy mode; None is
            ``model``.
        compare: How outputs are compared, as in :func:`verify_onnx`.
        constants: Scalar buffers of the model by name, and their values in the file written after verification.
        check: A last look at the complete file before it gets its name. Returns a difference, and raises an
            ``ExportError`` if the file must not be written.

    Returns:
        The largest difference from the reference, relative to the largest value of the same output.

    Raises:
        ExportError: If a package is missing, the file cannot be written, the model cannot be exported, or the file does
            not agree with the reference.
        ValueError: If the model is in training mode, or an argument has a value that is not allowed.

    Example:
        >>> import torch
        >>> from mmevm.deployment.export import export_onnx
        >>> from mmevm.models import EfficientViM
        >>> model = EfficientViM('m4').eval()
        >>> difference = export_onnx(model, 'm4.onnx', torch.rand(2, 3, 256, 384))  # doctest: +SKIP
    """
    _check_packages()
    if any(module.training for module in model.modules()):
        raise ValueError(f'{type(model).__name__} is in training mode, which is not exported: call its eval() first.')
    if opset < OPSET:
        raise ValueError(f'opset={opset}: expected {OPSET} or later.')
    if dynamic and (example.ndim != 4 or min(example.shape[0], *example.shape[2:]) < 2):
        raise ValueError(
            f'example of shape {tuple(example.shape)}: with dynamic=True, expected images (B, C, H, W) with B, H and W '
            'of at least 2, as the exporter takes a 1 for a constant.'
        )
    file = Path(file)
    check_folder(file)
    import onnx

    reference = model if reference is None else reference
    num_outputs = len(_run(reference, example))
    names = list(output_names) if output_names else [f'output_{i}' for i in range(num_outputs)]
    if len(names) != num_outputs or len(set(names)) != num_outputs:
        raise ValueError(f'output_names={names}: expected {num_outputs} different names.')

    proto = _to_onnx(model, example, dynamic, names, opset)
    onnx.helper.set_model_props(proto, dict(metadata or {}))
    temporary = file.with_name(f'.{os.getpid()}.{file.name}')
    try:
        onnx.save(proto, temporary)
        images = _other_images(example, size_divisor) if dynamic else [example]
        difference = verify_onnx(temporary, reference, images, compare=compare)
        if constants:
            _set_constants(proto, constants)
            onnx.save(proto, temporary)
        if check is not None:
            difference = max(difference, check(temporary))
        os.replace(temporary, file)
    except OSError as error:
        raise ExportError(f'{file} cannot be written: {error}.') from error
    finally:
        temporary.unlink(missing_ok=True)
    return difference


def verify_onnx(
    file: str | os.PathLike,
    reference: nn.Module,
    images: Iterable[Tensor],
    tolerance: float = TOLERANCE,
    compare: Compare | None = None,
) -> float:
    """Compare an ONNX file with a model, in ONNX Runtime on the CPU.

    Args:
        file: An ONNX file with one input.
        reference: The model that it must agree with.
        images: Inputs of both, one after another.
        tolerance: How much an output may differ, relative to its largest value.
        compare: Maps all outputs and those of the reference to how much each differs; None takes the largest difference
            relative to the largest value.

    Returns:
        The largest difference, relative to the largest value of the same output.

    Raises:
        ExportError: If ONNX Runtime cannot load or run the file, or an output has another shape or differs by more than
            ``tolerance``; the message says for which images.
    """
    _check_packages()
    name = f'The ONNX file of {type(reference).__name__}'
    try:
        session = OnnxSession(file, device='cpu')
    except EngineError as error:
        raise ExportError(f'{name}: {_shorten(error)}') from error
    largest = 0.0
    for x in images:
        for_images = f'for images of {_size(x)}'
        expected = [ref.cpu() for ref in _run(reference, x)]
        try:
            arrays = session(x.cpu().numpy())
        except Exception as error:
            raise ExportError(f'{name} fails {for_images}: {_shorten(error)}') from error
        if len(arrays) != len(expected):
            raise ExportError(f'{name} has {len(arrays)} outputs, expected {len(expected)}.')
        outputs = [torch.from_numpy(array) for array in arrays]
        for output_name, out, ref in zip(session.output_names, outputs, expected, strict=True):
            if compare is None and out.shape != ref.shape:
                raise ExportError(
                    f'{name}: {output_name} has shape {tuple(out.shape)} {for_images}, expected {tuple(ref.shape)}.'
                )
        differences = (compare or compare_tensors)(outputs, expected)
        for output_name, difference in zip(session.output_names, differences, strict=True):
            if not difference <= tolerance:  # also if it is NaN
                raise ExportError(
                    f'{name}: {output_name} differs from PyTorch {for_images} by {difference:.1e} of its largest '
                    f'value, more than {tolerance:.0e}.'
                )
            largest = max(largest, difference)
    return largest


def compare_tensors(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Return the largest difference of each tensor, relative to the largest value of the expected one."""
    differences = []
    for out, ref in zip(outputs, expected, strict=True):
        scale = ref.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny) if ref.numel() else 1.0
        difference = (out.double() - ref.double()).abs() / scale
        differences.append(difference.max().item() if ref.numel() else 0.0)
    return differences


def _check_packages() -> None:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX export needs {', '.join(missing)}: run pip install 'mmevm[export]'.")
    if TorchVersion(torch.__version__) < '2.7':  # the first whose exporter accepts names of dynamic sizes
        raise ExportError(f'ONNX export needs PyTorch 2.7 or later; this is {torch.__version__}.')


def check_folder(file: Path) -> None:
    """Raise an :class:`ExportError` if a file cannot be written, before an export that takes minutes."""
    if file.is_dir():
        raise ExportError(f'{file} is a folder: name a file in it.')
    if not file.parent.is_dir():
        raise ExportError(f'{file} cannot be written: there is no folder {file.parent}. Create it first.')
    if not os.access(file.parent, os.W_OK):
        raise ExportError(f'{file} cannot be written: no permission to write to the folder {file.parent}.')


def _to_onnx(
    model: nn.Module, example: Tensor, dynamic: bool, output_names: list[str], opset: int
) -> 'onnx.ModelProto':
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                TensorFunction(model),
                (example,),
                input_names=['image'],
                output_names=output_names,
                opset_version=opset,
                dynamo=True,
                dynamic_shapes=(DYNAMIC,) if dynamic else None,
                custom_translation_table=nms.translation_table(),
                verbose=False,
            )
        proto = program.model_proto  # type: ignore[union-attr]  # None is what the older exporter returns
    except Exception as error:  # anything that the exporter or the model raises
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        raise ExportError(f'{type(model).__name__} cannot be exported to ONNX: {_shorten(root)}') from error
    for node in proto.graph.node:
        del node.metadata_props[:]  # source lines with paths of this machine
    return proto


def _set_constants(proto: 'onnx.ModelProto', constants: Mapping[str, float]) -> None:
    import onnx

    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name, value in constants.items():
        tensor = tensors[f'model.{name}']  # of TensorFunction
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(value, dtype), tensor.name))


def _other_images(example: Tensor, size_divisor: int) -> Iterator[Tensor]:
    """Yield one image of the example's size, two that are not square, and three with odd sides if these are allowed.

    They are noise of the same standard deviation as the example.
    """
    _, channels, height, width = example.shape
    deviation = example.float().std(correction=0).item() or 1.0
    generator = torch.Generator().manual_seed(0)
    for shape in [
        (1, channels, height, width),
        (2, channels, max(height // 2, 1), width),
        (3, channels, height * 2 // 5 * 2 + 1, width // 3 * 2 + 1),
    ]:
        sides = [ceil(side / size_divisor) * size_divisor for side in shape[2:]]
        yield (torch.randn(*shape[:2], *sides, generator=generator) * deviation).to(example)


def _run(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    try:
        with torch.no_grad():
            return TensorFunction(model)(x)
    except Exception as error:  # anything may be wrong with a model
        raise ExportError(
            f'{type(model).__name__} itself fails for images of {_size(x)}, before any export: {_shorten(error)}'
        ) from error


def _size(x: Tensor) -> str:
    return '×'.join(map(str, x.shape))


def _shorten(error: BaseException) -> str:
    """Return the message of an error in one line."""
    return shorten(str(error) or type(error).__name__, 300, placeholder=' …')
