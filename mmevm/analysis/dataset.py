"""Look at a detection dataset before training: pictures, counts, and sizes beside the strides of the detector."""

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmcv.transforms import Compose
from mmdet.structures.bbox import get_box_tensor
from mmengine.config import Config
from mmengine.registry import DATASETS, VISUALIZERS, init_default_scope
from rich.console import Group, RenderableType
from rich.progress import track
from rich.table import Table

from mmevm.checks.config import iter_datasets, preview, type_name
from mmevm.checks.data import summarize_all
from mmevm.checks.explain import explain_dataset_error
from mmevm.errors import ConfigError

from .build import build_without_weights

_GAP = 8  # pixels between the two halves of a picture


class DatasetBrowser:
    """Tables and pictures of the data of a detector's config.

    Args:
        cfg: Config of MMDetection's scope.
        split: 'train', 'val' or 'test'.

    Raises:
        ConfigError: If the config is not that of a detector, or its data cannot be used.
    """

    def __init__(self, cfg: Config, split: str = 'train') -> None:
        key = f'{split}_dataloader'
        if cfg.get('default_scope') != 'mmdet' or not cfg.get(key):
            raise ConfigError(
                f'{cfg.filename} has default_scope={cfg.get("default_scope")!r} and '
                f'{"a" if cfg.get(key) else "no"} {key}. Give the config of a detector (mmdet) with {key}.'
            )
        init_default_scope('mmdet')
        self.cfg, self.split = cfg, split
        try:
            self.dataset = DATASETS.build(cfg[key].dataset)
        except Exception as error:
            if explanation := explain_dataset_error(cfg, [split]):
                raise ConfigError(explanation) from error
            raise
        self.summaries = summarize_all({f'{key}.dataset': self.dataset})
        # Each image as (dataset, what the annotations say about it).
        self.images = [(s.dataset, s.dataset.get_data_info(i)) for s in self.summaries for i in range(s.images)]
        self._scales = self._test_scales()
        rows = [
            (*instance['bbox'], *self._scales[info['width'], info['height']], instance['bbox_label'], number)
            for number, (_, info) in enumerate(self.images)
            for instance in info.get('instances') or ()
            if not instance.get('ignore_flag')
        ]
        if not rows:
            raise ConfigError(f'{key}.dataset: no image has an object. Correct its ann_file and metainfo.classes.')
        left, top, right, bottom, x_scale, y_scale, labels, numbers = np.array(rows, float).T
        self.labels, self.numbers = labels.astype(int), numbers.astype(int)  # class and image of each object
        self.boxes = np.stack([right - left, bottom - top], axis=1).clip(0)  # width and height in pixels
        self.scaled = self.boxes * np.stack([x_scale, y_scale], axis=1)  # after the resize of the test pipeline

    def _test_scales(self) -> dict[tuple[int, int], tuple[float, float]]:
        """Run the test pipeline once for each size of images, and return by how much it scales width and height."""
        _, config = next(iter_datasets(self.cfg, 'test' if self.cfg.get('test_dataloader') else self.split))
        pipeline = Compose([step for step in config['pipeline'] if type_name(step) != 'LoadAnnotations'])
        examples = {(info['width'], info['height']): info for _, info in self.images}
        return {
            size: getattr(pipeline(dict(info))['data_samples'], 'scale_factor', (1.0, 1.0))
            for size, info in examples.items()
        }

    def tables(self) -> Group:
        """Return what there is to know without looking at pictures."""
        return Group(*self._images(), *self._classes(), self._sizes(), *self._priors())

    def _images(self) -> Iterator[str]:
        for summary in self.summaries:
            yield str(summary)
            yield from (f'  warning: {warning}' for warning in summary.warnings)
        with_objects = set(self.numbers.tolist())
        empty = [info['img_path'] for number, (_, info) in enumerate(self.images) if number not in with_objects]
        names = f': {preview(Path(path).name for path in empty)}' if empty else ''
        yield f'images without objects: {len(empty)} of {len(self.images)}{names}'
        sizes = Counter((info['width'], info['height']) for _, info in self.images).most_common()
        shown = [
            f'{width}×{height} ({count}, ×{self._scales[width, height][0]:.2f})' for (width, height), count in sizes
        ]
        yield f'width × height (images, scale in the test pipeline): {preview(shown)}'

    def _classes(self) -> Iterator[RenderableType]:
        table = Table(title='Objects and their sizes: √(width × height) in pixels')
        table.add_column('class')
        for name in ('objects', 'images', 'size: 10 %', 'median', '90 %', 'resized median'):
            table.add_column(name, justify='right')
        counts = Counter(self.labels.tolist())
        classes = self.dataset.metainfo.get('classes') or [f'class {i}' for i in range(max(counts) + 1)]
        for label, name in sorted(enumerate(classes), key=lambda item: -counts[item[0]]):
            own = self.labels == label
            if not own.any():
                continue
            sizes = np.quantile(_size(self.boxes[own]), [0.1, 0.5, 0.9])
            scaled = np.median(_size(self.scaled[own]))
            images = len(np.unique(self.numbers[own]))
            table.add_row(name, f'{counts[label]}', f'{images}', *(f'{size:.0f}' for size in sizes), f'{scaled:.0f}')
        yield table
        if missing := [name for label, name in enumerate(classes) if not counts[label]]:
            yield f'classes without objects: {preview(missing, 20)}'

    def _sizes(self) -> Table:
        sizes = _size(self.scaled)
        table = Table(title='Sizes after the resize of the test pipeline')
        for name in ('pixels', 'objects', 'share', 'share up to here'):
            table.add_column(name, justify='right')
        edges = [0.0, *(2.0**power for power in range(2, 11)), np.inf]
        counts, total = np.histogram(sizes, edges)[0], 0
        used = np.flatnonzero(counts)
        for i in range(used[0], used[-1] + 1):
            total += counts[i]
            name = f'{edges[i]:.0f}–{edges[i + 1]:.0f}' if edges[i + 1] < np.inf else f'{edges[i]:.0f} or more'
            table.add_row(name, f'{counts[i]}', f'{counts[i] / len(sizes):.1%}', f'{total / len(sizes):.1%}')
        return table

    def _priors(self) -> Iterator[str]:
        """Describe the anchors or points of the detector beside the sizes of the objects."""
        sizes = _size(self.scaled)
        model = build_without_weights(self.cfg)
        for name, module in model.named_modules():
            priors = getattr(module, 'prior_generator', None)
            if priors is None:
                continue
            strides = [max(stride) for stride in priors.strides]
            text = f'model.{name}: {"anchors" if hasattr(priors, "base_anchors") else "points"} at strides '
            text += f'{", ".join(map(str, strides))}; '
            if hasattr(priors, 'base_anchors'):
                anchors = torch.cat(priors.base_anchors)
                shapes = (anchors[:, 2:] - anchors[:, :2]).numpy()
                best = _best_overlaps(self.scaled, shapes)
                text += f'sizes {_size(shapes).min():.0f} to {_size(shapes).max():.0f} pixels; '
                text += f'{np.mean(best >= 0.5):.1%} of the objects overlap a centered anchor with IoU ≥ 0.5; '
            yield text + (
                f'{np.mean(sizes < strides[0]):.1%} of the objects are smaller than the finest stride, '
                f'{np.mean(sizes < 2 * strides[0]):.1%} than twice that'
            )

    def draw(self, out_dir: Path, count: int) -> list[Path]:
        """Write pictures of images that are spread evenly over the dataset.

        Args:
            out_dir: Folder for the pictures.
            count: Number of images.

        Returns:
            The files. They show the annotations as they are in the files; those of training data also show, on the
            right, what the training pipeline makes of the image.
        """
        out_dir.mkdir(parents=True, exist_ok=True)
        visualizer = VISUALIZERS.build(
            dict(self.cfg.get('visualizer') or dict(type='DetLocalVisualizer'), vis_backends=None, name='browse')
        )
        visualizer.dataset_meta = self.dataset.metainfo
        chosen = np.unique(np.linspace(0, len(self.images) - 1, count).astype(int))
        warnings.filterwarnings('ignore', '.* is out of bounds', UserWarning)  # objects at the border
        paths = []
        by_path = {info['img_path']: (dataset, info) for dataset, info in self.images}
        for i in track(chosen.tolist(), f'Pictures in {out_dir}'):
            (dataset, info), halves = self.images[i], []
            if self.split == 'train':
                # MMDetection takes a random other image if a crop leaves no object.
                sample = self.dataset[i]
                dataset, info = by_path.get(sample['data_samples'].get('img_path'), (dataset, info))
                halves.append(_draw(visualizer, sample))
            halves.insert(0, _draw(visualizer, _load(dataset, info)))
            path = out_dir / f'{i:06d}_{Path(info["img_path"]).stem}.jpg'
            cv2.imwrite(str(path), _beside(halves)[..., ::-1])
            paths.append(path)
        return paths


def _size(boxes: np.ndarray) -> np.ndarray:
    """Return √(width × height) of boxes (N, 2)."""
    return np.sqrt(boxes.prod(axis=1))


def _best_overlaps(boxes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """Return the largest IoU of each box (N, 2) with anchors (M, 2) that have the same center."""
    common = np.minimum(boxes[:, None], anchors[None]).prod(axis=2)
    union = boxes.prod(axis=1)[:, None] + anchors.prod(axis=1)[None] - common
    return (common / union).max(axis=1)


def _load(dataset: Any, info: dict) -> dict:
    """Return an image and its annotations as they are in the files."""
    loader = dataset.pipeline.transforms[0]
    has_masks = any('mask' in instance for instance in info.get('instances') or ())
    annotations = dict(type='LoadAnnotations', with_bbox=True, with_mask=has_masks)
    return Compose([loader, annotations, dict(type='PackDetInputs', meta_keys=())])(dict(info))


def _draw(visualizer: Any, sample: dict) -> np.ndarray:
    """Draw the annotations of a sample of MMDetection: (H, W, 3) in RGB."""
    data_sample = sample['data_samples']
    data_sample.gt_instances.bboxes = get_box_tensor(data_sample.gt_instances.bboxes)
    image = sample['inputs'].permute(1, 2, 0).numpy()[..., ::-1]  # BGR, as MMDetection loads images
    visualizer.add_datasample('browse', np.ascontiguousarray(image), data_sample, draw_pred=False)
    return visualizer.get_image()


def _beside(images: list[np.ndarray]) -> np.ndarray:
    """Put images beside each other, on white."""
    height = max(len(image) for image in images)
    width = sum(image.shape[1] for image in images) + _GAP * (len(images) - 1)
    canvas, left = np.full((height, width, 3), 255, np.uint8), 0
    for image in images:
        canvas[: len(image), left : left + image.shape[1]] = image
        left += image.shape[1] + _GAP
    return canvas
