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
    """Multi-stage hidden state fusion: sum the logits of one classifier per backbone output (paper, Eq. 12–13).

    It takes the outputs of ``EfficientViM(out_indices=(2,), out_hidden_states=True)``, a tuple of the hidden states
    (B, C, N) of each stage and the last map (B, C, H, W)::

        backbone            norm        mean over     heads
        h of stages[0] ─ LayerNorm ─ the N states ─ Linear ┐
        h of stages[1] ─ LayerNorm ─ the N states ─ Linear ┤
        h of stages[2] ─ LayerNorm ─ the N states ─ Linear ┼ sum, weighted by softmax(weights) ─ logits
        map of stages[2] LayerNorm ─ the pixels   ─ Linear ┘

    Any number of hidden states and maps, in any order, are fused in the same way.

    Args:
        num_classes: K.
        in_channels: Channels of each output of the backbone: its ``out_channels``.
        distilled: Whether there is a second set of classifiers, trained by a teacher (see :meth:`loss`).
        norm_cfg: mmcv's config of the norms; None is ``dict(type='mmevm.LayerNorm2d')``.
        loss: mmpretrain's config of the loss.
        topk: Accuracies to log in training, if ``cal_acc``.
        cal_acc: Whether to log accuracies in training.
        init_cfg: mmengine's initialization config. With ``type='Pretrained'`` the checkpoint must contain every tensor
            of the head. If it has another number of classes, the classifiers start from random weights, which is
            logged.

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
            raise ValueError(f'in_channels={in_channels}: expected a list, the channels of each backbone output.')
        if num_classes < 1:
            raise ValueError(f'num_classes={num_classes}: expected at least 1.')
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
        """Return logits.

        Args:
            feats: Outputs of the backbone, (B, C, …) each.

        Returns:
            Logits, (B, K). A distilled head returns in training the logits of both sets of classifiers, and in eval
            mode their mean.
        """
        logits = self._logits(self.pre_logits(feats))
        if len(logits) == 1:
            return logits[0]
        return logits if self.training else (logits[0] + logits[1]) / 2

    def pre_logits(self, feats: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Normalize and average the outputs of the backbone.

        Args:
            feats: (B, C, H, W) or (B, C, N) each.

        Returns:
            (B, C) for each output.

        Raises:
            ValueError: If their channels are not ``in_channels``.
        """
        channels = tuple(x.shape[1] for x in feats)
        if channels != self.in_channels:
            raise ValueError(
                f'in_channels={self.in_channels} of the head does not match the outputs of the backbone, with '
                f'{channels} channels. Set in_channels={list(channels)}, or out_hidden_states=True of the backbone to '
                'get its hidden states.'
            )
        # The norms take maps: reshape hidden states (B, C, N) to (B, C, N, 1).
        maps = [x if x.ndim == 4 else x.unsqueeze(-1) for x in feats]
        return tuple(norm(x).mean((2, 3)) for norm, x in zip(self.norm, maps, strict=True))

    def loss(
        self,
        feats: tuple[Tensor, ...],
        data_samples: list[DataSample],
        teacher_logits: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Calculate the loss for the labels and, if there is a teacher, for its logits.

        Without a teacher, it is the loss of the logits of eval mode. With one, a distilled head is trained by hard
        distillation: half the loss for the labels, half the cross-entropy for the teacher's argmax (DeiT, Sec. 4).
        Other heads are trained by MESA: the loss for the labels plus the cross-entropy for the teacher's probabilities.

        Args:
            feats: Outputs of the backbone, (B, C, …) each.
            data_samples: The labels.
            teacher_logits: (B, K), for the same images.
            **kwargs: Further arguments of the loss.

        Returns:
            ``loss``; with a teacher, ``loss_cls`` for the labels and ``loss_distill`` or ``loss_mesa``. mmengine logs
            their sum as ``loss``.

        Raises:
            ValueError: If the teacher has another number of classes.
        """
        logits = self._logits(self.pre_logits(feats))
        if teacher_logits is None:
            return self._get_loss(sum(logits) / len(logits), data_samples, **kwargs)
        if teacher_logits.shape != logits[0].shape:
            raise ValueError(
                f'num_classes={self.num_classes} of the head does not match the teacher, which has '
                f'{teacher_logits.shape[1]} classes.'
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
        """Return predictions from the logits of eval mode, also in training mode."""
        logits = self._logits(self.pre_logits(feats))
        return self._get_predictions(sum(logits) / len(logits), data_samples)

    def init_weights(self) -> None:
        """Initialize as ``init_cfg`` says.

        Raises:
            CheckpointError: If a checkpoint in ``init_cfg`` does not contain every tensor of the head.
        """
        if not pretrained_cfgs(self.init_cfg):
            super().init_weights()
            return
        initialize(self, _INIT_CFG)  # for classifiers that are not in the checkpoint
        init_from_checkpoints(self, prefix='head', class_dependent=r'heads(_dist)?\.')

    def _logits(self, pooled: tuple[Tensor, ...]) -> tuple[Tensor] | tuple[Tensor, Tensor]:
        """Return the logits (B, K) of the classifiers trained by labels and, if any, of those trained by a teacher."""
        logits = _fuse(pooled, self.heads, self.weights)
        if not self.distilled:
            return (logits,)
        return logits, _fuse(pooled, self.heads_dist, self.weights_dist)


def _fuse(pooled: tuple[Tensor, ...], heads: nn.ModuleList, weights: Tensor) -> Tensor:
    logits = torch.stack([head(x) for head, x in zip(heads, pooled, strict=True)])  # (branches, B, K)
    return torch.einsum('n,nbk->bk', weights.softmax(0), logits)  # Eq. 13


@MODELS.register_module()
class DistillationClassifier(ImageClassifier):
    """mmpretrain's ``ImageClassifier`` with an optional distillation teacher.

    The teacher takes the images of the student after mixup and cutmix, so it is called here. A hook sets it for
    training, ``mmevm.MESAHook`` or ``mmevm.DistillationHook``. Checkpoints, copies and inference do not contain it and
    are those of an ``ImageClassifier``.

    An ``init_cfg`` with ``type='Pretrained'`` applies to backbone and head, and the checkpoint must contain every
    tensor of both. To use a prefix, give each of them its own ``init_cfg``.

    Attributes:
        teacher: Maps images (B, 3, H, W) to logits (B, K); None if there is no teacher. It is a function, as a module
            would become part of the network.
    """

    teacher: Callable[[Tensor], Tensor] | None = None
    init_cfg: dict | list[dict] | None  # mmengine's BaseModule has no type annotations

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != 'teacher'}  # copies have none

    def init_weights(self) -> None:
        """Initialize as ``init_cfg`` says.

        Raises:
            CheckpointError: If a checkpoint does not contain every tensor. mmengine's own loading would only warn.
            ConfigError: If ``init_cfg`` has a prefix, or the classifier has a neck, which would get no weights.
        """
        pretrained = pretrained_cfgs(self.init_cfg)
        if pretrained:
            if self.with_neck or any(cfg.get('prefix') for cfg in pretrained):
                raise ConfigError(
                    f'model.init_cfg={self.init_cfg}: in a DistillationClassifier, it applies to the backbone and the '
                    'head, and accepts neither a prefix nor a neck. Instead, give backbone.init_cfg and head.init_cfg.'
                )
            self.backbone.init_cfg = self.head.init_cfg = self.init_cfg
            self.init_cfg = None
        super().init_weights()

    def loss(self, inputs: Tensor, data_samples: list[DataSample]) -> dict[str, Tensor]:
        """Calculate the loss of the head.

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
