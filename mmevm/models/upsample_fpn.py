"""The neck for detection: a feature pyramid with levels finer than those of the backbone."""

import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmdet.models.necks import FPN
from torch import Tensor, nn

from mmevm.registry import MODELS

from .layers import LayerNorm2d


@MODELS.register_module()
class UpsampleFPN(FPN):
    """FPN with finer levels, upsampled from the finest map of the backbone.

    The first stage of EfficientViM has stride 16, but detectors expect strides from 4 or 8 on::

        backbone    pre_norms   lateral_convs
                                     ┌─ upsample_convs[1] ─ upsample_fpn_convs[1]   stride  4
                                     ├─ upsample_convs[0] ─ upsample_fpn_convs[0]   stride  8
        stride 16 ─ LayerNorm ─ 1×1 ─ + ──────────────────── fpn_convs[0]           stride 16
        stride 32 ─ LayerNorm ─ 1×1 ─ + ──────────────────── fpn_convs[1]           stride 32
        stride 64 ─ LayerNorm ─ 1×1 ─ + ──────────────────── fpn_convs[2]           stride 64
                          └─────────── fpn_convs[3], if add_extra_convs='on_input'  stride 128

    The input of ``upsample_convs[1]`` is the output of ``upsample_convs[0]``. The other levels are those of
    mmdet's FPN, applied to the maps after LayerNorm.

    Args:
        in_channels: Channels of each map of the backbone, finest first.
        out_channels: Channels of each level of the pyramid.
        num_outs: Number of levels: ``num_upsamples`` finer ones, one for each map, and the remaining ones coarser.
        num_upsamples: Number of levels finer than the backbone's first map; each halves the stride. 0 if that map is
            fine enough, as with ``EfficientViM(out_strides=(8, 16, 32, 64))``.
        add_extra_convs: Source of the coarser levels. False: max pooling of the last level. 'on_input' (or True),
            'on_lateral' and 'on_output': 3×3 convolutions of stride 2, the first of which takes the backbone's last map
            after its LayerNorm, the last lateral, or the last level.
        relu_before_extra_convs: Whether a ReLU stands before each of these convolutions except the first.
        norm_cfg: mmcv's config of norms in laterals and 3×3 convolutions; None for none.
        act_cfg: mmcv's config of activations there; None for none.
        init_cfg: mmengine's initialization config; None is FPN's, Xavier for convolutions.

    Raises:
        ValueError: If ``num_outs`` is smaller than the number of finer levels and maps.

    Example:
        >>> import torch
        >>> from mmevm.models import UpsampleFPN
        >>> neck = UpsampleFPN(in_channels=[128, 192, 320], out_channels=256, num_outs=5)
        >>> maps = [torch.rand(1, c, s, s) for c, s in [(128, 16), (192, 8), (320, 4)]]
        >>> for level in neck(maps):
        ...     print(tuple(level.shape))
        (1, 256, 64, 64)
        (1, 256, 32, 32)
        (1, 256, 16, 16)
        (1, 256, 8, 8)
        (1, 256, 4, 4)
    """

    def __init__(
        self,
        in_channels: list[int],
        out_channels: int,
        num_outs: int,
        num_upsamples: int = 2,
        add_extra_convs: bool | str = False,
        relu_before_extra_convs: bool = False,
        norm_cfg: dict | None = None,
        act_cfg: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if num_upsamples < 0 or num_outs < num_upsamples + len(in_channels):
            raise ValueError(
                f'num_outs={num_outs}: expected at least num_upsamples={num_upsamples} (0 or more) plus one level for '
                f'each of the {len(in_channels)} maps of in_channels={in_channels}.'
            )
        super().__init__(
            in_channels=list(in_channels),
            out_channels=out_channels,
            num_outs=num_outs - num_upsamples,
            add_extra_convs=add_extra_convs,
            relu_before_extra_convs=relu_before_extra_convs,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
            init_cfg=init_cfg or dict(type='Xavier', layer='Conv2d', distribution='uniform'),
        )
        self.pre_norms = nn.ModuleList(LayerNorm2d(channels) for channels in in_channels)
        self.upsample_convs = nn.ModuleList(
            ConvModule(out_channels, out_channels, 2, stride=2, conv_cfg=dict(type='deconv'), act_cfg=None)
            for _ in range(num_upsamples)
        )
        self.upsample_fpn_convs = nn.ModuleList(
            ConvModule(out_channels, out_channels, 3, padding=1, norm_cfg=norm_cfg, act_cfg=act_cfg, inplace=False)
            for _ in range(num_upsamples)
        )

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Build the pyramid.

        Args:
            inputs: Maps of the backbone, (B, C, H, W) each, finest first.

        Returns:
            ``num_outs`` levels of ``out_channels`` channels, finest first.

        Raises:
            ValueError: If the maps' channels are not ``in_channels``.
        """
        channels = [x.shape[1] for x in inputs]
        if channels != self.in_channels:
            raise ValueError(
                f'in_channels={self.in_channels} of the neck does not match the maps of the backbone, with {channels} '
                f'channels. Set in_channels={channels}.'
            )
        normed = [norm(x) for norm, x in zip(self.pre_norms, inputs, strict=True)]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, normed, strict=True)]
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + F.interpolate(laterals[i], size=laterals[i - 1].shape[-2:])

        finer = []
        x = laterals[0]
        for upsample, conv in zip(self.upsample_convs, self.upsample_fpn_convs, strict=True):
            x = upsample(x)
            finer.append(conv(x))
        # fpn_convs contains one convolution for each map, then those of the coarser levels.
        levels = [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=False)]
        return (*reversed(finer), *levels, *self._coarser_levels(normed[-1], laterals[-1], levels[-1]))

    def _coarser_levels(self, last_input: Tensor, last_lateral: Tensor, last_level: Tensor) -> list[Tensor]:
        coarser = []
        if not self.add_extra_convs:
            for _ in range(self.num_outs - self.num_ins):
                last_level = F.max_pool2d(last_level, 1, stride=2)
                coarser.append(last_level)
            return coarser
        x = dict(on_input=last_input, on_lateral=last_lateral, on_output=last_level)[self.add_extra_convs]
        for i, conv in enumerate(self.fpn_convs[self.num_ins :]):
            x = conv(F.relu(x) if i and self.relu_before_extra_convs else x)
            coarser.append(x)
        return coarser
