"""An image classifier that can learn from a teacher besides the labels."""

from collections.abc import Callable
from typing import Any

import torch
from mmpretrain.models.classifiers import ImageClassifier
from mmpretrain.structures import DataSample
from torch import Tensor

from mmevm.checkpoints import pretrained_cfgs
from mmevm.errors import ConfigError
from mmevm.registry import MODELS


@MODELS.register_module()
class TaughtImageClassifier(ImageClassifier):
    """mmpretrain's ``ImageClassifier``, whose loss also hears a teacher while there is one.

    A teacher has to see the very images of the student, after mixup and cutmix, so it is asked here. It is there in
    training only and set by a hook, ``mmevm.MESAHook`` or ``mmevm.DistillationHook``: checkpoints, copies and inference
    know nothing of it, and are those of an ``ImageClassifier``.

    An ``init_cfg`` of ``type='Pretrained'`` is that of backbone and head: each receives every tensor, or that is an
    error. With a prefix, say it for each of the two.

    Attributes:
        teacher: Gives logits (B, K) for images (B, 3, H, W); None if there is no teacher. A function, as a module would
            become part of the network.
    """

    teacher: Callable[[Tensor], Tensor] | None = None
    init_cfg: dict | list[dict] | None  # of mmengine's BaseModule, which has no types

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != 'teacher'}  # copies have none

    def init_weights(self) -> None:
        """Initialise as ``init_cfg`` says.

        Raises:
            CheckpointError: If a checkpoint does not hold every tensor. mmengine's own loading would only warn.
            ConfigError: If ``init_cfg`` has a prefix, or if there is a neck, which it would not reach.
        """
        pretrained = pretrained_cfgs(self.init_cfg)
        if pretrained:
            if self.with_neck or any(cfg.get('prefix') for cfg in pretrained):
                raise ConfigError(
                    'model.init_cfg of a TaughtImageClassifier is for a backbone and a head whose names begin with '
                    "'backbone.' and 'head.', without a neck: give backbone.init_cfg and head.init_cfg in its place."
                )
            self.backbone.init_cfg = self.head.init_cfg = self.init_cfg
            self.init_cfg = None
        super().init_weights()

    def loss(self, inputs: Tensor, data_samples: list[DataSample]) -> dict[str, Tensor]:
        """Calculate the head's loss.

        Args:
            inputs: Images, (B, 3, H, W).
            data_samples: Their labels.
        """
        feats = self.extract_feat(inputs)
        if self.teacher is None:
            return self.head.loss(feats, data_samples)
        with torch.no_grad():
            teacher_logits = self.teacher(inputs)
        return self.head.loss(feats, data_samples, teacher_logits=teacher_logits)
