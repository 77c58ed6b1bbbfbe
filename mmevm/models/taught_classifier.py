"""An image classifier that can learn from a teacher besides the labels."""

from collections.abc import Callable

import torch
from mmpretrain.models.classifiers import ImageClassifier
from mmpretrain.structures import DataSample
from torch import Tensor

from mmevm.registry import MODELS


@MODELS.register_module()
class TaughtImageClassifier(ImageClassifier):
    """mmpretrain's ``ImageClassifier``, whose loss also hears a teacher while there is one.

    A teacher has to see the very images of the student, after mixup and cutmix, so it is asked here. It is there in
    training only and set by a hook, ``mmevm.MESAHook`` or ``mmevm.DistillationHook``: checkpoints, copies and inference
    know nothing of it, and are those of an ``ImageClassifier``.

    Attributes:
        teacher: Gives logits (B, K) for images (B, 3, H, W); None if there is no teacher.
    """

    teacher: Callable[[Tensor], Tensor] | None = None

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
