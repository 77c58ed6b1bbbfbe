"""Image classification: fusion of hidden states from all stages, and an optional distillation teacher."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.model import initialize
from mmpretrain.models.classifiers import ImageClassifier
from mmpretrain.models.heads import ClsHead
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from mmevm.errors import ConfigError
from mmevm.registry import MODELS

from .weight_init import init_from_checkpoints, pretrained_cfgs

_INIT_CFG = dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.0)


@MODELS.register_module()
class FusionClsHead(ClsHead):
    """Sums the logits of one classifier for each of the backbone's outputs (paper, Sec. 3.2, Eq. 12–13).

    What crosses the seam is what ``EfficientViM(out_indices=(2,), out_hidden_states=True)`` returns, a tuple of hidden
    states (B, C, N) of each stage and the last map (B, C, H, W)::

        backbone            norm        mean over     heads
        h of stages[0] ─ LayerNorm ─ the N states ─ Linear ┐
        h of stages[1] ─ LayerNorm ─ the N states ─ Linear ┤
        h of stages[2] ─ LayerNorm ─ the N states ─ Linear ┼ sum, weighted by softmax(weights) ─ logits
        map of stages[2] LayerNorm ─ the pixels   ─ Linear ┘

    The head does not look at which is which: maps alone, of any number of stages, are fused in the same way.

    Args:
        num_classes: K.
        in_channels: C of each of the backbone's outputs, which is its ``out_channels``.
        distilled: Whether there is a second set of classifiers, which learns from a teacher (see :meth:`loss`).
        norm_cfg: mmcv's config of the norms; None is ``dict(type='mmevm.LayerNorm2d')``.
        loss: mmpretrain's config of the loss.
        topk: Accuracies to log in training, if ``cal_acc``.
        cal_acc: Whether to log accuracies in training.
        init_cfg: mmengine's initialisation config. With ``type='Pretrained'`` every tensor of the head must be in the
            checkpoint, as for the backbone; but if it knows another number of classes, the classifiers start from
            random weights, which is logged.

    Raises:
        ValueError: If ``in_channels`` or ``num_classes`` has a value that is not allowed.

    Example:
        >>> import torch
        >>> from mmevm.models import EfficientViM, FusionClsHead
        >>> backbone = EfficientViM('m1', out_indices=(2,), out_hidden_states=True).eval()
        >>> head = FusionClsHead(num_classes=10, in_channels=backbone.out_channels).eval()
        >>> tuple(head(backbone(torch.rand(2, 3, 64, 64))).shape)
        (2, 10)
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: Sequence[int],
        distilled: bool = False,
        norm_cfg: dict | None = None,
        loss: dict | None = None,
        topk: int | tuple[int, ...] = (1,),
        cal_acc: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if isinstance(in_channels, int) or not in_channels:
            raise ValueError(f'in_channels={in_channels}: give a list, the channels of each output of the backbone.')
        if num_classes < 1:
            raise ValueError(f'num_classes={num_classes}: at least 1.')
        super().__init__(
            loss=loss or dict(type='mmpretrain.CrossEntropyLoss', loss_weight=1.0),
            topk=topk,
            cal_acc=cal_acc,
            init_cfg=init_cfg or _INIT_CFG,
        )
        norm_cfg = norm_cfg or dict(type='mmevm.LayerNorm2d')
        self.in_channels = tuple(in_channels)
        self.num_classes = num_classes
        self.distilled = distilled
        self.norm = nn.ModuleList(build_norm_layer(norm_cfg, channels)[1] for channels in in_channels)
        self.weights = nn.Parameter(torch.ones(len(in_channels)))
        self.heads = nn.ModuleList(nn.Linear(channels, num_classes) for channels in in_channels)
        if distilled:
            self.weights_dist = nn.Parameter(torch.ones(len(in_channels)))
            self.heads_dist = nn.ModuleList(nn.Linear(channels, num_classes) for channels in in_channels)

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor | tuple[Tensor, Tensor]:
        """Classify.

        Args:
            feats: The backbone's outputs, (B, C, …) each.

        Returns:
            Logits, (B, K). A distilled head gives, in training, those of the labels' classifiers and those of the
            teacher's, else their mean.
        """
        logits = self._logits(self.pre_logits(feats))
        if len(logits) == 1:
            return logits[0]
        return logits if self.training else (logits[0] + logits[1]) / 2

    def pre_logits(self, feats: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Normalise and average the backbone's outputs.

        Args:
            feats: (B, C, H, W) or (B, C, N) each.

        Returns:
            (B, C) for each of them.

        Raises:
            ValueError: If their channels are not ``in_channels``.
        """
        channels = tuple(x.shape[1] for x in feats)
        if channels != self.in_channels:
            raise ValueError(
                f'The backbone gives outputs of {channels} channels, but the head has in_channels={self.in_channels}: '
                'set that to what the backbone gives; hidden states come with its out_hidden_states=True.'
            )
        # The norms are of maps, and take states as such: (B, C, N) as (B, C, N, 1).
        maps = [x if x.ndim == 4 else x.unsqueeze(-1) for x in feats]
        return tuple(norm(x).mean((2, 3)) for norm, x in zip(self.norm, maps, strict=True))

    def loss(
        self,
        feats: tuple[Tensor, ...],
        data_samples: list[DataSample],
        teacher_logits: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Compare with the labels and, where there is one, with a teacher's answer.

        Without a teacher, the loss is that of what inference would give. With one, a distilled head learns by hard
        distillation, half from the labels and half from the teacher's first choice (DeiT, Sec. 4); another head learns
        by MESA, fully from the labels and fully from the teacher's probabilities.

        Args:
            feats: The backbone's outputs, (B, C, …) each.
            data_samples: The labels.
            teacher_logits: (B, K), of the same images.
            **kwargs: Further arguments of the loss.

        Returns:
            ``loss``, of the labels; with a teacher, ``loss_cls`` of the labels and ``loss_distill`` or ``loss_mesa``,
            of which mmengine logs the sum as ``loss``.

        Raises:
            ValueError: If the teacher knows another number of classes.
        """
        logits = self._logits(self.pre_logits(feats))
        if teacher_logits is None:
            return self._get_loss(sum(logits) / len(logits), data_samples, **kwargs)
        if teacher_logits.shape != logits[0].shape:
            raise ValueError(
                f'The teacher knows {teacher_logits.shape[1]} classes, but the head has num_classes={self.num_classes}.'
            )
        losses = self._get_loss(logits[0], data_samples, **kwargs)
        losses['loss_cls'] = losses.pop('loss')
        if len(logits) == 2:
            losses['loss_cls'] = losses['loss_cls'] / 2
            losses['loss_distill'] = F.cross_entropy(logits[1], teacher_logits.argmax(1)) / 2
        else:
            losses['loss_mesa'] = F.cross_entropy(logits[0], teacher_logits.softmax(1))
        return losses

    def predict(
        self, feats: tuple[Tensor, ...], data_samples: list[DataSample | None] | None = None
    ) -> list[DataSample]:
        """Classify without a teacher, in any mode."""
        logits = self._logits(self.pre_logits(feats))
        return self._get_predictions(sum(logits) / len(logits), data_samples)

    def init_weights(self) -> None:
        """Initialise as ``init_cfg`` says.

        Raises:
            CheckpointError: If a checkpoint named by ``init_cfg`` does not hold every tensor of the head.
        """
        if not pretrained_cfgs(self.init_cfg):
            super().init_weights()
            return
        initialize(self, _INIT_CFG)  # for classifiers of other classes than the checkpoint's
        init_from_checkpoints(self, prefix='head', class_dependent=r'heads(_dist)?\.')

    def _logits(self, pooled: tuple[Tensor, ...]) -> tuple[Tensor] | tuple[Tensor, Tensor]:
        """(B, K) of the classifiers that learn from labels and, if distilled, of those that learn from a teacher."""
        logits = _fuse(pooled, self.heads, self.weights)
        if not self.distilled:
            return (logits,)
        return logits, _fuse(pooled, self.heads_dist, self.weights_dist)


def _fuse(pooled: tuple[Tensor, ...], heads: nn.ModuleList, weights: Tensor) -> Tensor:
    logits = torch.stack([head(x) for head, x in zip(heads, pooled, strict=True)])  # (branches, B, K)
    return torch.einsum('n,nbk->bk', weights.softmax(0), logits)  # Eq. 13


@MODELS.register_module()
class DistillationClassifier(ImageClassifier):
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
                    'model.init_cfg of a DistillationClassifier is for a backbone and a head whose names begin with '
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
