"""Quantize an exported file with images of a config, and compare its metrics with those of the original."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from mmevm.checks.config import iter_datasets
from mmevm.deployment.metadata import check_pipeline, parse_metadata
from mmevm.deployment.quantize import fuse_layers, layer_errors, quantize_onnx
from mmevm.errors import ConfigError, ExportError

from .inputs import READ_ERRORS, find_inputs, read_image
from .onnx import make_batch, prepare_image

SPLITS = ('train', 'val', 'test')
MAX_IMAGES = 128  # for calibration
# Metrics that a file may lose some of, and what a point of them is.
_METRICS = {'bbox_mAP': 0.01, 'segm_mAP': 0.01, 'mAP': 0.01, 'top1': 1.0, 'mIoU': 1.0}


def find_calibration_images(cfg: Config, names: Sequence[str]) -> list[str]:
    """Return paths of images.

    Args:
        cfg: A config.
        names: Images, folders and glob patterns, or one of ``SPLITS`` for the images of the config's data loader.

    Raises:
        ConfigError: If there are no images, or the dataset of the config cannot be read.
    """
    if not (len(names) == 1 and names[0] in SPLITS):
        images = find_inputs(names).images
        if not images:
            raise ConfigError(
                f'--calibration {" ".join(names)}: there are only videos. Give images or folders of images.'
            )
        return images
    (split,) = names
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    paths = []
    for key, dataset in iter_datasets(cfg, split):
        try:
            built = DATASETS.build(dict(dataset, pipeline=[]))
        except OSError as error:
            raise ConfigError(f'{key} cannot be read: {error}. Check its paths, or give --data-root.') from error
        paths += [built.get_data_info(i)['img_path'] for i in range(len(built))]
    if not paths:
        raise ConfigError(f'{split}_dataloader of the config has no images.')
    return paths


@dataclass
class Quantized:
    """What a quantization has done.

    Attributes:
        images: Number of calibration images.
        layers: Number of layers in int8.
        errors: What :func:`layer_errors` returns.
        metrics: Metrics of the original and of the quantized file by name; empty without ``max_drop``.
    """

    images: int
    layers: int
    errors: dict[str, float]
    metrics: dict[str, tuple[float, float]]


def quantize_file(
    source: Path,
    target: Path,
    cfg: Config,
    metadata: Mapping[str, str],
    images: Sequence[str],
    shape: Sequence[int | None] = (None, None),
    float_layers: Sequence[str] = (),
    max_drop: float | None = None,
) -> Quantized:
    """Write an int8 version of an exported file.

    Args:
        source: The exported file.
        target: Where to write. If anything fails, it stays as it was.
        cfg: The config that the file was exported with.
        metadata: That of the file.
        images: Paths of calibration images. Of more than ``MAX_IMAGES``, so many are taken at equal distances.
        shape: Height and width for which the file was exported; None if they may vary.
        float_layers: Names of layers to keep in float32, or patterns with ``*``.
        max_drop: How many points of box AP, mask AP, top-1 accuracy or mIoU on the config's test split the file may
            lose; None does not evaluate it.

    Raises:
        ConfigError: If the config has steps that a file does not describe, or no such metric, or an image cannot be
            read.
        ExportError: If a layer of ``float_layers`` does not exist, or the file loses more than ``max_drop``.
    """
    paths = [images[i] for i in np.linspace(0, len(images) - 1, min(len(images), MAX_IMAGES)).astype(int)]
    check_pipeline(metadata, str(target))
    values = parse_metadata(metadata, str(target))
    batches = _Batches(paths, values, shape)
    temporary = target.with_name(f'.{os.getpid()}.{target.name}')
    try:
        with TemporaryDirectory(prefix='mmevm-quantize-') as folder:
            fused = Path(folder, 'fused.onnx')
            fuse_layers(source, fused)
            layers = quantize_onnx(fused, temporary, batches, float_layers)
            errors = layer_errors(fused, temporary, list(islice(batches, 4)))
        metrics = {} if max_drop is None else _compare_metrics(cfg, source, temporary)
        _check_drop(metrics, max_drop, errors)
        shutil.move(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return Quantized(len(paths), layers, errors, metrics)


@dataclass
class _Batches:
    """Prepared images, one by one; they are read again in each iteration."""

    paths: Sequence[str]
    metadata: dict[str, Any]
    shape: Sequence[int | None]

    def __iter__(self) -> Iterator[np.ndarray]:
        for path in self.paths:
            try:
                image = read_image(path)
            except READ_ERRORS as error:
                raise ConfigError(
                    f'Calibration image {path} cannot be read ({type(error).__name__}: {error}). Repair it, or leave '
                    'it out of --calibration.'
                ) from error
            yield make_batch([prepare_image(image, self.metadata)[0]], self.metadata, self.shape)


def _compare_metrics(cfg: Config, source: Path, target: Path) -> dict[str, tuple[float, float]]:
    from .evaluation import evaluate  # imports the runner

    original, quantized = (evaluate(cfg, str(file)) for file in (source, target))
    names = [name for name in original if name.rpartition('/')[2] in _METRICS]
    if not names:
        raise ConfigError(
            f'--max-drop: test_evaluator of the config has none of the metrics {", ".join(_METRICS)}, but '
            f'{", ".join(original) or "none"}.'
        )
    return {name: (original[name], quantized[name]) for name in names}


def _check_drop(
    metrics: Mapping[str, tuple[float, float]], max_drop: float | None, errors: Mapping[str, float]
) -> None:
    for name, (original, quantized) in metrics.items():
        drop = (original - quantized) / _METRICS[name.rpartition('/')[2]]
        if max_drop is not None and drop > max_drop:
            raise ExportError(
                f'{name} falls from {original:.4g} to {quantized:.4g}, by {drop:.2f} points, more than --max-drop '
                f'{max_drop}: the file was not written. Keep the layers with the largest errors in float32: '
                f'--float-layers {" ".join(list(errors)[:5])}.'
            )
