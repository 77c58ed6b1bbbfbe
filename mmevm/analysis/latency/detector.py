"""Time whole detectors: from an image in memory to its objects.

- Preprocessing: resize the image to fit, normalize and pad it, with OpenCV and NumPy, the same for all engines.
- Network: up to the outputs of the heads; of a two-stage detector or a transformer, up to the pyramid.
- Post-processing: the rest, as the difference between the whole and these two. In PyTorch it is MMDetection's own. In
  ONNX Runtime and OpenVINO it is part of the file that ``tools/export_onnx.py --part detections`` writes; the network
  alone is timed in a file of its own.

With random weights, scores mean nothing. The score threshold is therefore set such that ``OBJECTS`` objects remain in
each image; transformers return all they have.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from torch import Tensor, nn

from mmevm.deployment.model_part import ONE_STAGE, TWO_STAGE, ModelPart
from mmevm.deployment.predictions import Predictions
from mmevm.deployment.preprocessing import normalize
from mmevm.errors import EngineError

from .engines import compile_settings, prepare

IMAGE_SIZE = (480, 640)  # height and width of the image in memory: the most frequent size in COCO
OBJECTS = 100
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def make_image() -> np.ndarray:
    """Return an image of noise, (480, 640, 3) uint8 in BGR."""
    return np.random.default_rng(0).integers(0, 256, (*IMAGE_SIZE, 3), np.uint8)


def preprocess(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize an image (H, W, 3) to fit into a height and width, normalize and pad it: (3, height, width)."""
    height, width = size
    image = mmcv.imrescale(image, (height, width))[:height, :width]
    result = np.zeros((3, *size), np.float32)
    result[:, : image.shape[0], : image.shape[1]] = normalize(image, _MEAN, _STD, to_rgb=True)
    return result


def preprocess_batch(image: np.ndarray, size: tuple[int, int], batch_size: int) -> np.ndarray:
    """Preprocess an image as often as a batch has images: (B, 3, height, width)."""
    return np.stack([preprocess(image, size) for _ in range(batch_size)])


class Network(nn.Module):
    """The network of a detector.

    Args:
        model: A detector of MMDetection.
        with_head: Whether it includes the ``bbox_head``, as of a one-stage detector.
    """

    def __init__(self, model: nn.Module, with_head: bool) -> None:
        super().__init__()
        self.model: Any = model
        self.with_head = with_head
        self.training = model.training

    def forward(self, x: Tensor) -> Any:
        """Map images (B, 3, H, W) to the outputs of the head, or to the pyramid."""
        features = self.model.extract_feat(x)
        return self.model.bbox_head(features) if self.with_head else features


def make_detector_calls(
    model: nn.Module,
    size: tuple[int, int],
    batch_size: int,
    engine: str,
    dtype: str,
    form: dict[str, Any],
    folder: Path,
) -> dict[str, Callable[[], Any]]:
    """Return functions of no arguments to time: 'preprocessing', 'network' and the 'whole' detector.

    Args:
        model: A one-stage or two-stage detector that ``--part detections`` supports or, in PyTorch, DINO and other
            transformers, with random weights.
        size: Height and width of the network's input.
        batch_size: Images per call.
        engine: One of ``ENGINES``, but not 'cudagraph'.
        dtype: One of ``DTYPES``.
        form: Device, dtype and memory format of the network's input.
        folder: Where the ONNX files of this model and shape are, or will be written.

    Raises:
        EngineError: If the engine is 'cudagraph' or cannot run the detector, or as for ``prepare``.
    """
    if engine == 'cudagraph':
        raise EngineError('cudagraph cannot capture the post-processing of a detector. Use eager or compile.')
    prepare_images = partial(preprocess_batch, make_image(), size, batch_size)

    def make_input() -> Tensor:
        return torch.from_numpy(prepare_images()).to(**form)

    x = make_input()
    whole: nn.Module
    if isinstance(model, (*ONE_STAGE, *TWO_STAGE)):
        part = ModelPart(model, 'detections')
        _limit_objects(part, x[:1])  # all images are the same
        network, whole = Network(model, with_head=not part.has_rois), part.reference()
    elif engine in ('onnxruntime', 'openvino'):
        raise EngineError(f'the post-processing of {type(model).__name__} cannot be exported. Use eager or compile.')
    else:  # a transformer, which returns the same number of objects whatever their scores
        transformer: Any = model
        count = transformer.bbox_head.test_cfg.get('max_per_img', transformer.num_queries)
        network, whole = Network(model, with_head=False), Predictions(model, count)
    if engine in ('onnxruntime', 'openvino'):
        folder.mkdir(exist_ok=True)
        run_network = prepare(engine, None, x, dtype, onnx_file=_export(network, folder / 'network.onnx', x))
        run_whole = prepare(engine, None, x, dtype, onnx_file=_export(part, folder / 'detections.onnx', x))
    else:
        run_network = prepare('eager', network, x, dtype)
        run_whole = prepare('eager', whole, x, dtype)
        if engine == 'compile':
            with compile_settings():
                for module in _networks(model):
                    module.compile(dynamic=False)
                run_network(x)
                run_whole(x)
    return dict(preprocessing=prepare_images, network=partial(run_network, x), whole=lambda: run_whole(make_input()))


def _export(model: nn.Module, file: Path, x: Tensor) -> Path:
    from mmevm.deployment.export import export_onnx  # imports onnx

    if not file.exists():
        # Values are not compared: random weights give almost equal scores, and rounding decides which objects remain;
        # RTMDet's exponentials may overflow.
        export_onnx(model, file, x, dynamic=False, compare=lambda outputs, expected: [0.0] * len(expected))
    return file


def _limit_objects(part: ModelPart, x: Tensor) -> None:
    """Set the score threshold such that ``OBJECTS`` objects remain in an image (1, 3, H, W)."""
    part.set_score_threshold(0.0)
    with torch.no_grad():
        scores = part(x)[0][0, :OBJECTS, 4].float()
    lowest = scores.min().item()
    part.set_score_threshold(lowest * (1 - 1e-6))  # to keep the last one, too


def _networks(model: Any) -> list[nn.Module]:
    """Return the modules between which MMDetection's own code runs."""
    heads = getattr(model, 'roi_head', None)
    names = ('backbone', 'neck', 'encoder', 'decoder', 'rpn_head', 'bbox_head')
    found = [getattr(model, name, None) for name in names]
    found += [getattr(heads, name, None) for name in ('bbox_head', 'mask_head')]
    return [module for module in found if module is not None]
