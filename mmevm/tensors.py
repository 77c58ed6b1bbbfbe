"""Wrap a model as a function from one tensor to a flat tuple of tensors, as tracers and exporters need it."""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from mmengine.structures import BaseDataElement
from torch import Tensor, nn

if find_spec('mmdet') is not None:  # classification alone does not need MMDetection
    from mmdet.models.detectors import BaseDetector
    from mmdet.structures import DetDataSample

    DETECTORS: tuple[type[nn.Module], ...] = (BaseDetector,)
else:
    DETECTORS = ()


def flatten_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples, mappings and mmengine data elements, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, BaseDataElement):
        yield from flatten_tensors(value.all_values())
    elif isinstance(value, Mapping):
        yield from flatten_tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from flatten_tensors(item)


def is_segmentor(model: nn.Module) -> bool:
    """Return whether a model is one of MMSegmentation, which is not imported to find out."""
    return any((base.__name__, base.__module__[:6]) == ('BaseSegmentor', 'mmseg.') for base in type(model).__mro__)


class TensorFunction(nn.Module):
    """Call a model with one tensor and return all tensors of its output.

    Args:
        model: A backbone or a model of mmevm, MMDetection, MMPretrain, MMSegmentation or timm. It also passes a
            detector the data samples that its forward needs.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map images (B, C, H, W) to all tensors that the model returns.

        Raises:
            ValueError: If the model returns no tensor.
        """
        kwargs: dict[str, Any] = {}
        if isinstance(self.model, DETECTORS):  # the default mode is 'tensor', and needs the size of each image
            size = tuple(int(length) for length in x.shape[-2:])
            shapes = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), size)
            metainfo = dict(shapes, scale_factor=(1.0, 1.0))
            kwargs['data_samples'] = [DetDataSample(metainfo=metainfo) for _ in range(len(x))]
        outputs = tuple(flatten_tensors(self.model(x, **kwargs)))
        if not outputs:  # a tracer drops everything that no output depends on
            raise ValueError(f'{type(self.model).__name__} returns no tensor, so there is nothing to trace.')
        return outputs
