"""Run a file of ``tools/export_onnx.py`` on images: the same results as from its config and checkpoint."""

import math
from collections.abc import Sequence
from typing import Any

import cv2
import mmcv
import numpy as np

from mmevm.deployment.masks import paste_masks, resize_masks
from mmevm.deployment.metadata import check_pipeline, read_metadata
from mmevm.deployment.preprocessing import normalize
from mmevm.deployment.segmentation import to_class_map
from mmevm.deployment.session import OnnxSession
from mmevm.errors import ConfigError, ExportError

from .inputs import READ_ERRORS, read_image
from .predictor import Inferencer, Prediction


def build_onnx_inferencer(file: str, device: str | None = None) -> Inferencer:
    """Build the inferencer for the task of a file.

    Args:
        file: A file with detections, the logits of a classifier, or the logits or the class map of a segmentor.
        device: cpu or cuda; None is a GPU if this build of ONNX Runtime supports one.

    Raises:
        ConfigError: If the file has no metadata of mmevm, or does not describe how images are prepared.
        EngineError: If ONNX Runtime is not installed, or cannot use the file or the device.
    """
    model = OnnxModel(file, device)
    check_pipeline(model.metadata, file)
    kinds: dict[str, Any] = {
        'classification': OnnxClassificationInferencer,
        'semantic segmentation': OnnxSegmentationInferencer,
    }
    return kinds.get(model.metadata['task'], OnnxDetectionInferencer)(model)


class OnnxModel:
    """An exported file that takes images.

    Args:
        file: An ONNX file.
        device, engine, dtype: As for :class:`OnnxSession`.

    Attributes:
        metadata: What :func:`read_metadata` returns.

    Raises:
        ConfigError: If the file has no metadata of mmevm.
        EngineError: As for :class:`OnnxSession`.
    """

    def __init__(
        self, file: str, device: str | None = None, engine: str = 'onnxruntime', dtype: str = 'float32'
    ) -> None:
        self._session = OnnxSession(file, engine, device, dtype)
        self.metadata = read_metadata(self._session.metadata, file)

    def __call__(self, images: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Map prepared images (C, H, W) to the outputs of each, by name. Images of different sizes are padded.

        Raises:
            ConfigError: If the file was exported for one shape, and an image is larger.
        """
        batch, _, *sides = self._session.input_shape
        x = make_batch(images, self.metadata, sides)
        step = batch or len(x)
        chunks = [self._session(x[i : i + step]) for i in range(0, len(x), step)]
        outputs = [np.concatenate(parts) for parts in zip(*chunks, strict=True)]
        return [dict(zip(self._session.output_names, rows, strict=True)) for rows in zip(*outputs, strict=True)]


def prepare_image(image: np.ndarray, metadata: dict[str, Any]) -> tuple[np.ndarray, tuple[float, float]]:
    """Return an image as an exported file takes it, (3, H', W'), and by how much width and height were scaled.

    Args:
        image: (H, W, 3) uint8 in BGR.
        metadata: ``pipeline``, ``channel_order``, ``image_mean`` and ``image_std`` of :func:`read_metadata`.
    """
    scale = (1.0, 1.0)
    for step in metadata['pipeline']:
        height, width = image.shape[:2]
        if step['type'] in ('Resize', 'ResizeEdge', 'ResizeToMultiple'):
            image = _resize(image, step)
            scale = (image.shape[1] / width * scale[0], image.shape[0] / height * scale[1])
        elif step['type'] == 'Pad':
            image = _pad(image, step)
        else:
            image = _center_crop(image, step['crop_size'])
    return normalize(image, metadata['image_mean'], metadata['image_std'], metadata['channel_order'] == 'RGB'), scale


def make_batch(
    images: Sequence[np.ndarray], metadata: dict[str, Any], sides: Sequence[int | None] = (None, None)
) -> np.ndarray:
    """Pad prepared images (C, H, W) at the bottom and on the right to one batch (B, C, H', W').

    Args:
        images: What :func:`prepare_image` returns.
        metadata: ``pad_size_divisor``, ``pad_value`` and, if there is one, ``pad_size`` of :func:`read_metadata`.
        sides: Height and width for which a file was exported; None if they may vary.

    Raises:
        ConfigError: If an image is larger than ``sides``.
    """
    divisor = metadata['pad_size_divisor']
    lengths = [max(image.shape[i] for image in images) for i in (1, 2)]
    least = metadata.get('pad_size') or (1, 1)
    lengths = [max(math.ceil(length / divisor) * divisor, least[i]) for i, length in enumerate(lengths)]
    if any(side is not None and length > side for length, side in zip(lengths, sides, strict=True)):
        raise ConfigError(
            f'The file was exported for images of {sides[0]}×{sides[1]} (height × width), but its pipeline makes one '
            f'of {lengths[0]}×{lengths[1]}. Export it without --shape, or with this size.'
        )
    height, width = (side or length for side, length in zip(sides, lengths, strict=True))
    batch = np.full((len(images), len(images[0]), height, width), metadata['pad_value'], np.float32)
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return batch


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
        prepared = [prepare_image(image, self.model.metadata) for image in images]
        outputs = self.model([x for x, _ in prepared])
        predictions: list[Prediction] = []
        for image, (_, scale), output in zip(images, prepared, outputs, strict=True):
            objects = find_objects(output, scale, image.shape[:2], self.model.metadata)
            picture = self._draw(image, objects, score_thr) if draw else None
            predictions.append((self._describe(objects), picture))
        return predictions

    def _describe(self, objects: dict[str, np.ndarray]) -> dict[str, Any]:
        from mmdet.structures.mask import encode_mask_results

        result: dict[str, Any] = {key: objects[key].tolist() for key in ('labels', 'scores', 'bboxes')}
        if 'masks' in objects:
            encoded = encode_mask_results(objects['masks'])
            result['masks'] = [mask | dict(counts=mask['counts'].decode()) for mask in encoded]
        result['class_names'] = [self.classes[i] if self.classes else f'class {i}' for i in objects['labels']]
        return result

    def _draw(self, image: np.ndarray, objects: dict[str, np.ndarray], score_thr: float) -> np.ndarray:
        import torch
        from mmdet.structures import DetDataSample
        from mmengine.structures import InstanceData

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
        outputs = self.model([prepare_image(image, self.model.metadata)[0] for image in images])
        for image, output in zip(images, outputs, strict=True):
            scores = softmax(output['logits'])
            label = int(scores.argmax())
            result = dict(pred_scores=scores.tolist(), pred_label=label, pred_score=float(scores[label]))
            if self.classes:
                result['pred_class'] = self.classes[label]
            sample = DataSample().set_pred_score(scores).set_pred_label(label)
            predictions.append((result, draw_class(self.visualizer, image, sample, self.classes) if draw else None))
        return predictions


class OnnxSegmentationInferencer:
    """What ``SegmentationInferencer`` finds, from a file exported with ``--part model`` or ``--part class_map``."""

    def __init__(self, model: OnnxModel) -> None:
        # MMSegmentation takes seconds to import.
        from .segmentation import ClassMapDescriber

        self.model = model
        classes = model.metadata.get('classes') or [f'class {i}' for i in range(model.metadata['num_classes'])]
        self.describer = ClassMapDescriber(classes, model.metadata.get('palette'))

    read = staticmethod(read_image)

    def infer(self, images: list[np.ndarray], draw: bool = True, score_thr: float = 0.3) -> list[Prediction]:
        """Segment one batch, as ``SegmentationInferencer.infer``."""
        prepared = [prepare_image(image, self.model.metadata)[0] for image in images]
        # Padding would change the classes near it.
        batches = [prepared] if len({x.shape for x in prepared}) == 1 else [[x] for x in prepared]
        outputs = [output for batch in batches for output in self.model(batch)]
        return [
            self.describer(image, find_class_map(output, x.shape[1:], image.shape[:2], self.model.metadata), draw)
            for image, x, output in zip(images, prepared, outputs, strict=True)
        ]


def find_class_map(
    output: dict[str, np.ndarray], prepared: tuple[int, ...], size: tuple[int, ...], metadata: dict[str, Any]
) -> np.ndarray:
    """Return the index of the class of each pixel of an image at its original resolution, (H, W).

    Args:
        output: Outputs of a file of a segmentor for one image, by name: logits, or the class map. Logits are resized
            to the image as MMSegmentation does; a class map can only be resized without interpolation.
        prepared: Height and width of the image as the file took it, without padding.
        size: Height and width of the original image.
        metadata: What :func:`read_metadata` returns.
    """
    height, width = prepared
    if 'class_map' in output:
        class_map = output['class_map'][:height, :width].astype(np.uint16)
        return cv2.resize(class_map, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    import torch
    from torch.nn.functional import interpolate

    logits = torch.from_numpy(output['logits'][None, :, :height, :width])
    logits = interpolate(logits, tuple(size), mode='bilinear', align_corners=metadata['align_corners'])
    return to_class_map(logits, metadata['threshold'])[0].numpy()


def find_objects(
    output: dict[str, np.ndarray], scale: tuple[float, float], size: tuple[int, ...], metadata: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Return the objects of an image at its original resolution.

    Args:
        output: Outputs of a file with detections for one image, by name.
        scale: By how much width and height of the image were scaled.
        size: Height and width of the original image.
        metadata: What :func:`read_metadata` returns.

    Returns:
        ``bboxes`` (N, 4), ``scores`` (N,), ``labels`` (N,) and, if the file has them, boolean ``masks`` (N, H, W).
    """
    found = output['labels'] >= 0
    dets, labels = output['dets'][found], output['labels'][found]
    objects = dict(bboxes=dets[:, :4] / np.array([*scale, *scale], np.float32), scores=dets[:, 4], labels=labels)
    if 'masks' in output:
        masks, threshold, shape = output['masks'][found], metadata['mask_threshold'], (size[0], size[1])
        if metadata['mask_stride'] is None:
            objects['masks'] = paste_masks(masks, objects['bboxes'], shape, threshold)
        else:
            objects['masks'] = resize_masks(masks, metadata['mask_stride'], scale, shape, threshold)
    return objects


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return probabilities of classes (N,)."""
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def check_images(file: str, reference: Inferencer, sources: Sequence[str], tolerance: float) -> tuple[int, float]:
    """Compare a file with the inferencer of its config and checkpoint on real images, from reading to results.

    Args:
        file: An exported file.
        reference: What :func:`build_inferencer` returns.
        sources: Paths of images.
        tolerance: How much results may differ, as in :func:`verify_onnx`.

    Returns:
        The number of objects (of a classifier: of images, of a segmentor: of classes in each image), and the largest
        difference (of a segmentor: the share of pixels with another class).

    Raises:
        ConfigError: If the file has no metadata of mmevm, or an image cannot be read.
        ExportError: If the results of an image differ by more than ``tolerance``.
    """
    inferencer, count, largest = build_onnx_inferencer(file, 'cpu'), 0, 0.0
    for source in sources:
        try:
            image = reference.read(source)
        except READ_ERRORS as error:
            raise ConfigError(f'{source} cannot be read ({type(error).__name__}: {error}).') from error
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
    if 'sem_seg' in expected:
        return float((result['sem_seg'] != expected['sem_seg']).mean())
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


def _resize(image: np.ndarray, step: dict[str, Any]) -> np.ndarray:
    if step['type'] == 'ResizeToMultiple':
        interpolation = step['interpolation'] or 'bilinear'  # as MMSegmentation
        return mmcv.imresize_to_multiple(image, step['size_divisor'], scale_factor=1, interpolation=interpolation)
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
