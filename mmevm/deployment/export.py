"""ONNX files of a backbone, a classifier or a detector, which get their name once they agree with PyTorch; and CoreML.

An exporter follows one pass of a model. What it takes for a constant there, such as the number of images or a branch
that depends on it, makes a file that is wrong for other images only. So each file is run in ONNX Runtime at other sizes
and batches than those of its export, and compared, before it is put in its place.

The exporter is PyTorch's newer one, which builds on ``torch.export``. The older one, of TorchScript, writes the trained
form with the number of images baked in, and the deploy form not at all. CoreML takes a traced model of a fixed shape,
and runs on Apple's systems only, so what is converted elsewhere has been compared with nothing.
"""

import inspect
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from mmevm.errors import ConfigError, UserError
from mmevm.tensors import DETECTORS

if TYPE_CHECKING:
    import onnx

if find_spec('mmdet') is not None:  # classification alone needs no MMDetection
    from mmdet.models.detectors import SingleStageDetector

    ONE_STAGE: tuple[type, ...] = (SingleStageDetector,)
else:
    ONE_STAGE = ()

# Largest difference from PyTorch, relative to the largest value of an output.
TOLERANCE = 1e-3
# The oldest that PyTorch's exporter writes; LayerNorm is one operator from 17 on.
OPSET = 18

PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
DYNAMIC = {0: 'batch', 2: 'height', 3: 'width'}
PARTS = ('backbone', 'neck', 'model', 'detections')
# At this size, a multiple of every usual stride, the size of a map tells its stride.
EXAMPLE_SIZE = (256, 384)


Compare = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[float]]


class ExportError(UserError):
    """A model that cannot be written as ONNX, or whose file does not do what it does; the message says where."""


def export_onnx(
    model: nn.Module,
    file: str | os.PathLike,
    example: Tensor,
    dynamic: bool = True,
    output_names: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
    opset: int = OPSET,
    reference: nn.Module | None = None,
    compare: Compare | None = None,
    constants: Mapping[str, float] | None = None,
) -> float:
    """Write the function of a model as ONNX, checked in ONNX Runtime.

    The input of the file is called ``image``. Nothing is at ``file`` but what was there before, or a file that has
    passed the check.

    Args:
        model: In eval mode; it takes one tensor and returns one, or tuples and lists of them, which the file has
            one after another.
        file: What to write. Weights are within it, so a model has to be smaller than 2 GB.
        example: Images, (B, C, H, W), as the model takes them. With ``dynamic``, B, H and W are greater than 1, and so
            should be those of every map within the model: the exporter takes a 1 for a constant.
        dynamic: Whether the file takes any B, H and W; else those of the example only, and an example of any shape.
        output_names: Names of the outputs, in order; None is ``output_0`` and so on.
        metadata: What else the file says of itself (``metadata_props``).
        opset: Version of ONNX's operators, at least 18.
        reference: What the file has to agree with, such as the model before it was deployed; None is the model.
        compare: How outputs are compared, as in :func:`check_onnx`.
        constants: Scalar buffers of the model by name, and what they are in the file once it has passed the check.

    Returns:
        The largest difference from the reference, relative to the largest value of the same output.

    Raises:
        ExportError: If a package is missing, if the file cannot be written there, if the model cannot be written as
            ONNX, or if the file gives something else than the reference.
        ValueError: If the model is in training mode, or if an argument has a value that is not allowed.

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
        raise ValueError(f'opset={opset}: the exporter writes {OPSET} and later ones.')
    if dynamic and (example.ndim != 4 or min(example.shape[0], *example.shape[2:]) < 2):
        raise ValueError(
            f'With dynamic=True the example is images (B, C, H, W) with B, H and W from 2 on, not '
            f'{tuple(example.shape)}: the exporter takes a 1 for a constant.'
        )
    file = Path(file)
    _check_place(file)
    import onnx

    reference = model if reference is None else reference
    num_outputs = len(_run(reference, example))
    names = list(output_names) if output_names else [f'output_{i}' for i in range(num_outputs)]
    if len(names) != num_outputs or len(set(names)) != num_outputs:
        raise ValueError(f'{type(model).__name__} has {num_outputs} outputs, which need a name each: not {names}.')

    written = _to_onnx(model, example, dynamic, names, opset)
    onnx.helper.set_model_props(written, dict(metadata or {}))
    temporary = file.with_name(f'.{file.name}.{os.getpid()}')
    try:
        onnx.save(written, temporary)
        images = _other_images(example) if dynamic else [example]
        difference = check_onnx(temporary, reference, images, compare=compare)
        if constants:
            onnx.save(_with_constants(written, constants), temporary)
        os.replace(temporary, file)
    except OSError as error:
        raise ExportError(f'{file} cannot be written: {error}.') from error
    finally:
        temporary.unlink(missing_ok=True)
    return difference


def check_onnx(
    file: str | os.PathLike,
    reference: nn.Module,
    images: Iterable[Tensor],
    tolerance: float = TOLERANCE,
    compare: Compare | None = None,
) -> float:
    """Compare a file with a model, in ONNX Runtime on the CPU.

    Args:
        file: An ONNX file with one input.
        reference: What it has to agree with.
        images: What both are given, one after another.
        tolerance: How much an output may differ, relative to its largest value.
        compare: From all outputs and those of the reference to how much each differs; None is by the largest
            difference relative to the largest value.

    Returns:
        The largest difference, relative to the largest value of the same output.

    Raises:
        ExportError: If ONNX Runtime does not take the file or an image, or if an output has another shape or differs
            by more; the message says for which images.
    """
    _check_packages()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised, and said once
    name = type(reference).__name__
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=['CPUExecutionProvider'])
    except Exception as error:  # of its own kinds, without a common ancestor
        raise ExportError(f'ONNX Runtime does not take the file of {name}: {_gist(error)}') from error
    largest = 0.0
    for x in images:
        of_images = f'for images of {"×".join(map(str, x.shape))}'
        expected = [ref.cpu() for ref in _run(reference, x)]
        try:
            arrays = session.run(None, {session.get_inputs()[0].name: x.cpu().numpy()})
        except Exception as error:
            raise ExportError(f'The ONNX file of {name} fails {of_images}: {_gist(error)}') from error
        if len(arrays) != len(expected):
            raise ExportError(f'The ONNX file of {name} has {len(arrays)} outputs in place of {len(expected)}.')
        outputs = [torch.from_numpy(array) for array in arrays]
        for output, out, ref in zip(session.get_outputs(), outputs, expected, strict=True):
            if out.shape != ref.shape:
                raise ExportError(
                    f'{output.name} of the ONNX file of {name} has the shape {tuple(out.shape)} {of_images}, in place '
                    f'of {tuple(ref.shape)}.'
                )
        for output, difference in zip(session.get_outputs(), (compare or _differences)(outputs, expected), strict=True):
            if not difference <= tolerance:  # also where it is not a number
                raise ExportError(
                    f'{output.name} of the ONNX file of {name} differs from PyTorch {of_images} by {difference:.1e} of '
                    f'its largest value; at most {tolerance:.0e} is accepted.'
                )
            largest = max(largest, difference)
    return largest


def export_coreml(
    model: nn.Module,
    file: str | os.PathLike,
    example: Tensor,
    output_names: Sequence[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the function of a model for images of one shape as a CoreML package, in float16 as is CoreML's default.

    Its outputs are not compared with PyTorch's, which takes a Mac.

    Args:
        model: In eval mode, as for :func:`export_onnx`.
        file: What to write, ending in ``.mlpackage``; replaced if it is there.
        example: Images, (B, C, H, W).
        output_names: Names of the outputs, in order.
        metadata: What else the package says of itself.

    Raises:
        ExportError: If coremltools is missing, if the package cannot be written there, or if it cannot be converted.
    """
    if find_spec('coremltools') is None:
        raise ExportError('A CoreML package needs coremltools, not installed here: pip install coremltools.')
    file = Path(file)
    _check_folder(file)
    import coremltools

    _run(model, example)
    try:
        with torch.no_grad():
            traced = torch.jit.trace(_Flat(model), example)
        package = coremltools.convert(
            traced,
            inputs=[coremltools.TensorType(name='image', shape=example.shape)],
            outputs=[coremltools.TensorType(name=name) for name in output_names],
            convert_to='mlprogram',
        )
        package.user_defined_metadata.update(metadata or {})
        package.save(str(file))
    except Exception as error:  # whatever the tracer or the converter raises
        raise ExportError(f'{type(model).__name__} cannot be written as CoreML: {_gist(_root(error))}') from error


class ModelPart(nn.Module):
    """A classifier, a detector or a part of it as a function of its images.

    Args:
        model: A model of mmevm, MMDetection or MMPretrain.
        part: 'backbone'; 'neck', a detector's pyramid; 'model', a classifier's logits or what the heads of a one-stage
            detector put out, without post-processing; or 'detections', what a one-stage detector finds. None is 'neck'
            of a detector that has one, else 'model' of a classifier, or 'backbone'.

    Attributes:
        part: The same, but never None.
        compare: What ``export_onnx`` should compare its outputs by.

    Raises:
        ConfigError: If the model has no such part, or if it is no function of the images alone.
    """

    def __init__(self, model: nn.Module, part: str | None = None) -> None:
        super().__init__()
        detector, one_stage = isinstance(model, DETECTORS), isinstance(model, ONE_STAGE)
        has = {name: getattr(model, name, None) is not None for name in ('backbone', 'neck')}
        self.part = part or ('model' if not detector else 'neck' if has['neck'] else 'backbone')
        kind = type(model).__name__
        if self.part not in PARTS:
            raise ConfigError(f'--part {part}: choose from {", ".join(PARTS)}.')
        if self.part == 'neck' and not detector:
            raise ConfigError(f'--part neck is for detectors: take backbone or model of a {kind}.')
        if not has.get(self.part, True):
            raise ConfigError(f'--part {self.part}: the {kind} of this config has no {self.part}.')
        if self.part == 'detections' and not detector:
            raise ConfigError(f'--part detections is for detectors: take backbone or model of a {kind}.')
        if self.part in ('model', 'detections') and detector and not one_stage:
            raise ConfigError(
                f'--part {self.part} is for one-stage detectors, not for a {kind}, whose heads depend on the regions '
                'that are found in an image: take neck.'
            )
        self.post_processing, self.compare = None, None
        if self.part == 'detections':
            from .post_processing import PostProcessing, differences  # which need MMDetection

            self.post_processing, self.compare = PostProcessing(model.bbox_head).train(model.training), differences
        self.model: Any = model  # their libraries have no types
        self.training = model.training

    def forward(self, image: Tensor) -> Any:
        """(B, C, H, W) to what the part returns."""
        if self.post_processing is not None:
            return self.post_processing(self.model(image), image.shape[2:])
        if self.part == 'backbone':
            return self.model.backbone(image)
        return self.model.extract_feat(image) if self.part == 'neck' else self.model(image)

    def lift_threshold(self) -> dict[str, float]:
        """Let anything count as an object, as little is found in the noise that a file is checked with.

        Returns:
            The ``constants`` for :func:`export_onnx` that bring the threshold back into the file.
        """
        if self.post_processing is None:
            return {}
        threshold = self.post_processing.score_thr
        constants = {'post_processing.score_thr': threshold.item()}
        threshold.fill_(2.0**-100)  # in place of 0, which would become one with other zeros of the file
        return constants

    def output_names(self, channels: int = 3) -> list[str]:
        """Names of the outputs: what an output is, and the stride of a map, such as ``cls_scores_stride8``.

        Args:
            channels: Channels of an image.
        """
        if self.part == 'detections':
            return ['dets', 'labels']
        if self.part == 'model' and not isinstance(self.model, DETECTORS):
            return ['logits']
        parameter = next(self.parameters())
        with torch.no_grad():
            outputs = self(parameter.new_zeros(1, channels, *EXAMPLE_SIZE))
        if self.part == 'model':  # MMDetection names what a head puts out where it takes it back
            kinds = inspect.signature(self.model.bbox_head.predict_by_feat).parameters
            groups = list(zip((f'{kind}_' for kind in kinds), outputs, strict=False))
        else:
            groups = [('', outputs)]
        names = [kind + _what(x) for kind, group in groups for x in _tensors(group)]
        counts = Counter(names)
        return [f'{name}_{names[:i].count(name)}' if counts[name] > 1 else name for i, name in enumerate(names)]


def preprocessing(cfg: Config) -> dict[str, str]:
    """What a config's data preprocessor does to images, as metadata of a file whose input is what it puts out.

    Returns:
        ``image_mean`` and ``image_std``, of pixels from 0 to 255 in the order of ``channel_order`` (RGB or BGR), and
        ``pad_size_divisor``, of which height and width are made multiples.
    """
    given = cfg.model.get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    channels = cfg.model.get('backbone', {}).get('in_channels', 3)
    mean, std = given.get('mean') or [0.0] * channels, given.get('std') or [1.0] * channels
    rgb = given.get('bgr_to_rgb') or given.get('to_rgb')  # images are read as BGR
    return {
        'image_mean': json.dumps(list(mean)),
        'image_std': json.dumps(list(std)),
        'channel_order': 'RGB' if rgb else 'BGR',
        'pad_size_divisor': str(given.get('pad_size_divisor') or 1),
    }


def _check_packages() -> None:
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ExportError(
            f"ONNX export needs {', '.join(missing)}, not installed here: pip install 'mmevm[export]' has all of it."
        )
    if TorchVersion(torch.__version__) < '2.7':  # the first whose exporter takes names of dynamic sizes
        raise ExportError(f'ONNX export needs PyTorch 2.7 or later, and this is {torch.__version__}.')


def _check_place(file: Path) -> None:
    if file.is_dir():
        raise ExportError(f'{file} is a folder: name a file in it.')
    _check_folder(file)


def _check_folder(file: Path) -> None:
    if not file.parent.is_dir():
        raise ExportError(f'{file} cannot be written: there is no folder {file.parent}. Make it first.')
    if not os.access(file.parent, os.W_OK):
        raise ExportError(f'{file} cannot be written: the folder {file.parent} may not be written to.')


class _Flat(nn.Module):
    """A model as a function from one tensor to a tuple of tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(_tensors(self.model(image)))


def _to_onnx(
    model: nn.Module, example: Tensor, dynamic: bool, output_names: list[str], opset: int
) -> 'onnx.ModelProto':
    name = type(model).__name__
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                _Flat(model),
                (example,),
                input_names=['image'],
                output_names=output_names,
                opset_version=opset,
                dynamo=True,
                dynamic_shapes=(DYNAMIC,) if dynamic else None,
                verbose=False,
            )
        written = program.model_proto  # type: ignore[union-attr]  # None is what the older exporter returns
    except Exception as error:  # whatever the exporter, or the model under it, raises
        raise ExportError(f'{name} cannot be written as ONNX: {_gist(_root(error))}') from error
    for node in written.graph.node:
        del node.metadata_props[:]  # lines of the source it came from, on this disk
    return written


def _other_images(example: Tensor) -> Iterator[Tensor]:
    """One image of the example's size, two that are not square, and three with odd sides."""
    _, channels, height, width = example.shape
    generator = torch.Generator().manual_seed(0)
    for shape in [
        (1, channels, height, width),
        (2, channels, max(height // 2, 1), width),
        (3, channels, height * 2 // 5 * 2 + 1, width // 3 * 2 + 1),
    ]:
        yield torch.randn(shape, generator=generator).to(example)


def _run(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    try:
        with torch.no_grad():
            return tuple(_tensors(model(x)))
    except Exception as error:  # anything may be wrong with a model
        raise ExportError(
            f'{type(model).__name__} itself fails for images of {"×".join(map(str, x.shape))}, so there is nothing '
            f'that its ONNX file could be compared with: {_gist(error)}'
        ) from error


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    else:
        raise TypeError(f'it returns a {type(value).__name__}, and not tensors alone.')


def _what(x: Tensor) -> str:
    if x.ndim != 4:
        return 'hidden_states' if x.ndim == 3 else 'output'
    return f'stride{EXAMPLE_SIZE[0] // x.shape[2]}'


def _differences(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    return [_difference(out, ref) for out, ref in zip(outputs, expected, strict=True)]


def _difference(out: Tensor, ref: Tensor) -> float:
    if not ref.numel():
        return 0.0
    scale = ref.double().abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return ((out.double() - ref.double()).abs().max() / scale).item()


def _with_constants(written: 'onnx.ModelProto', constants: Mapping[str, float]) -> 'onnx.ModelProto':
    import onnx

    tensors = {tensor.name: tensor for tensor in written.graph.initializer}
    for name, value in constants.items():
        tensor = tensors[f'model.{name}']
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.array(value, dtype), tensor.name))
    return written


def _root(error: BaseException) -> BaseException:
    """What an error was raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _gist(error: BaseException) -> str:
    """What an error says, in one line."""
    return shorten(str(error) or type(error).__name__, 300, placeholder=' …')
