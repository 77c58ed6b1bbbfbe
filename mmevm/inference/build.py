"""From a config to the inferencer of its task."""

import torch
from mmengine.config import Config
from mmengine.device import get_device

from mmevm.errors import ConfigError

from .predictor import Inferencer


def build_inferencer(cfg: Config, checkpoint: str, device: str | None = None, deploy_mode: bool = False) -> Inferencer:
    """Build the inferencer for the task of a config.

    Args:
        cfg: A config of MMDetection's, MMPretrain's or MMSegmentation's scope.
        checkpoint: What ``fetch_checkpoint`` takes: a local file, a URL and more.
        device: Where the model runs; None is a GPU if there is one.
        deploy_mode: Whether to fuse the layers of the model first: the same results, faster.

    Raises:
        CheckpointError: If the checkpoint cannot be read or is not one of this model.
        ConfigError: If the config is for another task, or lacks a model or a test_dataloader, if the device cannot be
            used, or if the model has no deploy mode.
    """
    scope = cfg.get('default_scope')
    if scope not in ('mmdet', 'mmpretrain', 'mmseg'):
        raise ConfigError(
            f'default_scope={scope!r} in {cfg.filename}: inference needs a config of a detector (mmdet), a classifier '
            '(mmpretrain) or a segmentor (mmseg). Set default_scope to the library whose dataset and pipeline the '
            'config uses.'
        )
    for key in ('model', 'test_dataloader'):
        if not cfg.get(key):
            raise ConfigError(
                f'{key} is missing in {cfg.filename}: inference builds cfg.model and prepares images with the '
                'pipeline of test_dataloader.dataset. Give the config that the model was trained with.'
            )
    if device is not None:
        _check_device(device)
    # Each library takes seconds to import.
    if scope == 'mmdet':
        from .detection import DetectionInferencer

        return DetectionInferencer(cfg, checkpoint, device, deploy_mode)
    if scope == 'mmseg':
        from .segmentation import SegmentationInferencer

        return SegmentationInferencer(cfg, checkpoint, device, deploy_mode)
    from .classification import ClassificationInferencer

    return ClassificationInferencer(cfg, checkpoint, device, deploy_mode)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ConfigError(
            f'--device {device} cannot be used: {str(error).splitlines()[0]}. Give cpu, or a device that this PyTorch '
            f'build supports (found: {get_device()}).'
        ) from error
