"""Run a file of ``tools/export_onnx.py`` in ONNX Runtime: the same results as from its config and checkpoint."""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mmcv
import numpy as np

from mmevm.deployment.masks import paste_masks, resize_masks
from mmevm.deployment.metadata import read_metadata
from mmevm.errors import ConfigError, ExportError

from .inputs import read_image
from .predictor import Inferencer, Prediction


def build_onnx_inferencer(file: str, device: str | None = None) -> Inferencer:
    """Build the inferencer for the task of a file.

    Args:
        file: A file with detections, or the logits of a classifier.
        device: cpu or cuda; None is a GPU if this build of ONNX Runtime supports one.

    Raises:
        ConfigError: If the file cannot be read or has no metadata of mmevm, or the device cannot be used.
    """
    model = OnnxModel(file, device)
    if model.metadata['task'] == 'classification':
        return OnnxClassificationInferencer(model)
    return OnnxDetectionInferencer(model)


class OnnxModel:
    """A session of ONNX Runtime that takes images.

    Args:
        file: An exported file.
        device: cpu or cuda; None is a GPU if this build of ONNX Runtime supports one.

    Attributes:
        metadata: What :func:`read_metadata` returns.
    """

    def __init__(self, file: str, device: str | None = None) -> None:
        if find_spec('onnxruntime') is None:
            raise ConfigError(f"{file} needs onnxruntime: run pip install 'mmevm[export]'.")
        import onnxruntime

        if not Path(file).is_file():
            raise ConfigError(f'{file}: there is no such file ({Path(file).resolve()}).')
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised; do not log them too
        providers = _providers(device, onnxruntime.get_available_providers())
        try:
            self._session = onnxruntime.InferenceSession(file, options, providers=providers)
        except Exception as error:  # its error classes have no common base
            raise ConfigError(f'{file} cannot be loaded by ONNX Runtime: {" ".join(str(error).split())}') from error
        self.metadata = read_metadata(self._session.get_modelmeta().custom_metadata_map, file)
        self._input = self._session.get_inputs()[0]
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, images: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Map prepared images (C, H, W) to the outputs of each, by name. Images of different sizes are padded.

        Raises:
            ConfigError: If the file was exported for one shape, and an image is larger.
        """
        batch, _, *fixed = self._input.shape
        divisor = self.metadata['pad_size_divisor']
        sides = [max(image.shape[i] for image in images) for i in (1, 2)]
        sides = [math.ceil(side / divisor) * divisor for side in sides]
        for i, side in enumerate(fixed):
            if isinstance(side, int):  # else it is the name of a dynamic one
                if sides[i] > side:
                    raise ConfigError(
                        f'The file was exported for images of {fixed[0]}×{fixed[1]} (height × width), but its '
                        f'pipeline makes one of {sides[0]}×{sides[1]}. Export it without --shape, or with this size.'
                    )
                sides[i] = side
        x = np.full((len(images), len(images[0]), *sides), self.metadata['pad_value'], np.float32)
        for row, image in zip(x, images, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = image
        step = batch if isinstance(batch, int) else len(x)
        chunks = [self._session.run(None, {self._input.name: x[i : i + step]}) for i in range(0, len(x), step)]
        outputs = [np.concatenate(parts) for parts in zip(*chunks, strict=True)]
        return [dict(zip(self._names, rows, strict=True)) for rows in zip(*outputs, strict=True)]

    def prepare(self, image: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
        """Return an image as the model takes it, and by how much its width and height were scaled.

        Args:
            image: (H, W, 3) uint8 in BGR.
        """
        scale = (1.0, 1.0)
        for step in self.metadata['pipeline']:
            height, width = image.shape[:2]
            if step['type'] in ('Resize', 'ResizeEdge'):
                image = _resize(image, step)
                scale = (image.shape[1] / width * scale[0], image.shape[0] / height * scale[1])
            elif step['type'] == 'Pad':
                image = _pad(image, step)
            else:
                image = _center_crop(image, step['crop_size'])
        if self.metadata['channel_order'] == 'RGB':
            image = image[..., ::-1]
        mean, std = (np.array(self.metadata[key], np.float32) for key in ('image_mean', 'image_std'))
        return ((image.astype(np.float32) - mean) / std).transpose(2, 0, 1), scale


class OnnxDetectionInferencer:
    """What ``DetectionInferencer`` finds, from a file exported with ``--part detections``."""

    def __init__(self, model: OnnxModel) -> None:
        # MMDetection takes seconds to import.
        from mmdet.visualization import DetLocalVisualizer

        self.model = model
        self.classes = model.metadata.get('classes')
        self.visualizer = DetLocalVisualizer()
        self.visualizer.dataset_meta = dict(
            classes=self.classes, palette=[tuple(color) for color in model.metadata.get('palette') or ()] or 'random'
        )

    read = staticmethod(read_image)

    def infer(self, images: list[np.ndarray], draw: bool = True, score_thr: float = 0.3) -> list[Prediction]:
        """Detect objects in one batch, as ``DetectionInferencer.infer``."""
        prepared = [self.model.prepare(image) for image in images]
        outputs = self.model([x for x, _ in prepared])
        predictions: list[Prediction] = []
        for image, (_, scale), output in zip(images, prepared, outputs, strict=True):
            found = output['labels'] >= 0
            dets, labels = output['dets'][found], output['labels'][found]
            boxes = dets[:, :4] / np.array([*scale, *scale], np.float32)
            masks = None
            if 'masks' in output:
                masks = self._masks(output['masks'][found], boxes, scale, image.shape[:2])
            picture = self._draw(image, boxes, dets[:, 4], labels, masks, score_thr) if draw else None
            predictions.append((self._describe(boxes, dets[:, 4], labels, masks), picture))
        return predictions

    def _masks(
        self, masks: np.ndarray, boxes: np.ndarray, scale: tuple[float, float], size: tuple[int, ...]
    ) -> np.ndarray:
        threshold, shape = self.model.metadata['mask_threshold'], (size[0], size[1])
        if self.model.metadata['mask_stride'] is None:
            return paste_masks(masks, boxes, shape, threshold)
        return resize_masks(masks, self.model.metadata['mask_stride'], scale, shape, threshold)

    def _describe(
        self, boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray, masks: np.ndarray | None
    ) -> dict[str, Any]:
        from mmdet.structures.mask import encode_mask_results

        result = dict(labels=labels.tolist(), scores=scores.tolist(), bboxes=boxes.tolist())
        if masks is not None:
            encoded = encode_mask_results(masks)
            result['masks'] = [mask | dict(counts=mask['counts'].decode()) for mask in encoded]
        result['class_names'] = [self.classes[i] if self.classes else f'class {i}' for i in labels]
        return result

    def _draw(
        self,
        image: np.ndarray,
        boxes: np.ndarray,
        scores: np.ndarray,
        labels: np.ndarray,
        masks: np.ndarray | None,
        score_thr: float,
    ) -> np.ndarray:
        import torch
        from mmdet.structures import DetDataSample
        from mmengine.structures import InstanceData

        objects = dict(bboxes=boxes, scores=scores, labels=labels) | ({} if masks is None else dict(masks=masks))
        instances = InstanceData(**{key: torch.from_numpy(value) for key, value in objects.items()})
        sample = DetDataSample(pred_instances=instances)
        self.visualizer.add_datasample('', image[..., ::-1].copy(), sample, draw_gt=False, pred_score_thr=score_thr)
        return np.ascontiguousarray(self.visualizer.get_image()[..., ::-1])


class OnnxClassificationInferencer:
    """What ``ClassificationInferencer`` finds, from a file exported with ``--part model``."""

    def __init__(self, model: OnnxModel) -> None:
        from mmpretrain.visualization import UniversalVisualizer

        self.model = model
        self.classes = model.metadata.get('classes')
        self.visualizer = UniversalVisualizer()

    read = staticmethod(read_image)

    def infer(self, images: list[np.ndarray], draw: bool = True, score_thr: float = 0.3) -> list[Prediction]:
        """Classify one batch, as ``ClassificationInferencer.infer``."""
        from mmpretrain.structures import DataSample

        from .classification import draw_class

        predictions: list[Prediction] = []
        outputs = self.model([self.model.prepare(image)[0] for image in images])
        for image, output in zip(images, outputs, strict=True):
            exponentials = np.exp(output['logits'] - output['logits'].max())
            scores = exponentials / exponentials.sum()
            label = int(scores.argmax())
            result = dict(pred_scores=scores.tolist(), pred_label=label, pred_score=float(scores[label]))
            if self.classes:
                result['pred_class'] = self.classes[label]
            sample = DataSample().set_pred_score(scores).set_pred_label(label)
            predictions.append((result, draw_class(self.visualizer, image, sample, self.classes) if draw else None))
        return predictions


def check_images(file: str, reference: Inferencer, sources: Sequence[str], tolerance: float) -> tuple[int, float]:
    """Compare a file with the inferencer of its config and checkpoint on real images, from reading to results.

    Args:
        file: An exported file.
        reference: What :func:`build_inferencer` returns.
        sources: Paths of images.
        tolerance: How much results may differ, as in :func:`verify_onnx`.

    Returns:
        The number of objects (of a classifier: of images), and the largest difference.

    Raises:
        ConfigError: If the file has no metadata of mmevm.
        ExportError: If the results of an image differ by more than ``tolerance``.
    """
    inferencer, count, largest = build_onnx_inferencer(file, 'cpu'), 0, 0.0
    for source in sources:
        image = reference.read(source)
        ((expected, _),) = reference.infer([image], draw=False, score_thr=0.0)
        ((result, _),) = inferencer.infer([image], draw=False, score_thr=0.0)
        difference = _difference(result, expected)
        count += len(expected.get('labels', [0]))
        if not difference <= tolerance:
            raise ExportError(
                f'{source}: the results of the ONNX file differ from those of the checkpoint by {difference:.1e}, more '
                f'than {tolerance:.0e}.'
            )
        largest = max(largest, difference)
    return count, largest


def _difference(result: dict[str, Any], expected: dict[str, Any]) -> float:
    if 'pred_scores' in expected:
        return float(np.abs(np.subtract(result['pred_scores'], expected['pred_scores'])).max())
    import torch
    from pycocotools import mask as rle

    from mmevm.deployment.predictions import compare_detections, compare_masks

    sides = []
    for side in (result, expected):
        boxes, scores = torch.tensor(side['bboxes']).reshape(-1, 4), torch.tensor(side['scores']).reshape(-1, 1)
        parts = [torch.cat([boxes, scores], 1), torch.tensor(side['labels'], dtype=torch.long)]
        if side.get('masks'):
            parts.append(torch.from_numpy(rle.decode(side['masks'])).permute(2, 0, 1).bool())
        sides.append([part.unsqueeze(0) for part in parts])
    if not expected['labels'] or not result['labels']:
        return 0.0 if expected['labels'] == result['labels'] else math.inf
    differences = compare_detections(sides[0][:2], sides[1][:2])
    return max(differences + ([compare_masks(*sides)] if expected.get('masks') else []))


def _providers(device: str | None, available: list[str]) -> list[str]:
    kinds = dict(cpu='CPUExecutionProvider', cuda='CUDAExecutionProvider')
    if device is None:
        return [provider for provider in reversed(kinds.values()) if provider in available]
    if kinds.get(device) not in available:
        raise ConfigError(
            f'--device {device}: expected one of {", ".join(k for k, v in kinds.items() if v in available)} for an '
            'ONNX file in this build of ONNX Runtime. For an NVIDIA GPU, install onnxruntime-gpu in its place.'
        )
    return [kinds[device]]


def _resize(image: np.ndarray, step: dict[str, Any]) -> np.ndarray:
    options = dict(interpolation=step['interpolation'], backend=step['backend'])
    if step['type'] == 'Resize' and step['keep_ratio']:
        return mmcv.imrescale(image, tuple(step['scale']), **options)
    if step['type'] == 'Resize':
        return mmcv.imresize(image, tuple(step['scale']), **options)
    height, width = image.shape[:2]
    edge, length = step['edge'], step['scale']
    by_width = edge == 'width' or (edge == 'short' and width < height) or (edge == 'long' and width > height)
    size = (length, int(length * height / width)) if by_width else (int(length * width / height), length)
    return mmcv.imresize(image, size, **options)


def _pad(image: np.ndarray, step: dict[str, Any]) -> np.ndarray:
    height, width = image.shape[:2]
    if step['size']:
        width, height = step['size']
    elif step['pad_to_square']:
        height = width = max(height, width)
    if divisor := step['size_divisor']:
        height, width = (math.ceil(side / divisor) * divisor for side in (height, width))
    value = step['pad_val']
    value = tuple(value) if isinstance(value, list) else (value,) * image.shape[2]
    return mmcv.impad(image, shape=(height, width), pad_val=value)


def _center_crop(image: np.ndarray, size: list[int]) -> np.ndarray:
    width, height = size
    top, left = max(0, round((image.shape[0] - height) / 2.0)), max(0, round((image.shape[1] - width) / 2.0))
    return image[top : top + height, left : left + width]
