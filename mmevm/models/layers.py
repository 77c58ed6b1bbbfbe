"""What EfficientViM is made of, in the order an image meets it: stem, channel LayerNorm, FFN, down-sampling.

Attribute names are those of the authors' checkpoints, so that weights can be followed by eye.
"""

from collections.abc import Iterable
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from mmcv.cnn import build_conv_layer, build_norm_layer
from mmcv.cnn.bricks.conv_module import efficient_conv_bn_eval_forward
from timm.layers import SqueezeExcite
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from mmevm.registry import MODELS

M = TypeVar('M', bound=nn.Module)


def items(container: nn.ModuleList | nn.Sequential, kind: type[M]) -> Iterable[M]:
    """The modules in a container, of which torch's types tell no more than that they are modules."""
    return cast('Iterable[M]', container)


class ConvNorm(nn.Module):
    """Convolution without bias, optional norm, optional ReLU.

    Padding keeps the size (stride 1) or gives ``ceil(size / stride)``.

    mmcv's ``ConvModule`` would do, but it names its norm after the norm's type (``bn``); checkpoints call it ``norm``.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Odd side of the kernel.
        stride: Stride of the convolution.
        groups: Groups of the convolution; ``in_channels`` makes it depthwise.
        norm_cfg: mmcv's config of the norm; None for none.
        relu: Whether a ReLU follows.
        conv_cfg: mmcv's config of the convolution; None is ``Conv2d``.
    """

    conv: _ConvNd
    norm: nn.Module

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        norm_cfg: dict | None = None,
        relu: bool = False,
        conv_cfg: dict | None = None,
    ) -> None:
        super().__init__()
        self.conv = build_conv_layer(
            conv_cfg,
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=False,
        )
        self.norm = build_norm_layer(norm_cfg, out_channels)[1] if norm_cfg else nn.Identity()
        self.act: nn.Module = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, …) to (B, out_channels, …)."""
        if self.training and self._has_fixed_statistics():
            # Of one convolution autograd keeps less than of a convolution and a norm, and gives the same gradients.
            return self.act(efficient_conv_bn_eval_forward(self.norm, self.conv, x))
        return self.act(self.norm(self.conv(x)))

    def _has_fixed_statistics(self) -> bool:
        norm = self.norm
        return isinstance(norm, _BatchNorm) and not norm.training and norm.running_var is not None


class Stem(nn.Module):
    """Four 3×3 convolutions of stride 2: an image becomes tokens of 16×16 pixels (paper, Fig. 4).

    Args:
        in_channels: Channels of the image.
        embed_dims: Channels of the tokens, a multiple of 8.
        norm_cfg: mmcv's config of the norms.
    """

    def __init__(self, in_channels: int, embed_dims: int, norm_cfg: dict) -> None:
        super().__init__()
        widths = [in_channels, embed_dims // 8, embed_dims // 4, embed_dims // 2, embed_dims]
        self.conv = nn.Sequential(
            *(
                ConvNorm(widths[i], widths[i + 1], 3, stride=2, norm_cfg=norm_cfg, relu=i < 3)
                for i in range(len(widths) - 1)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, embed_dims, ceil(H/16), ceil(W/16))."""
        return self.conv(x)


@MODELS.register_module()
class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of each pixel of a (B, C, H, W) map.

    Mean and variance are taken in at least float32, whatever autocast says: a sum of squares of features of 1e4 does
    not fit into float16, and bfloat16 has not enough digits for the mean.

    Args:
        num_channels: C.
        eps: Added to the variance.
    """

    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        y = F.layer_norm(x.permute(0, 2, 3, 1).to(dtype), weight.shape, weight, bias, self.eps)
        return y.permute(0, 3, 1, 2).to(x.dtype)


class FFN(nn.Module):
    """Two 1×1 convolutions with a ReLU between: mixes the channels of each pixel.

    Args:
        channels: C, of input and output.
        hidden_channels: Channels between the two.
        norm_cfg: mmcv's config of the norms.
    """

    def __init__(self, channels: int, hidden_channels: int, norm_cfg: dict) -> None:
        super().__init__()
        self.fc1 = ConvNorm(channels, hidden_channels, 1, norm_cfg=norm_cfg, relu=True)
        self.fc2 = ConvNorm(hidden_channels, channels, 1, norm_cfg=norm_cfg)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return self.fc2(self.fc1(x))


class PatchMerging(nn.Module):
    """Down-sampling between two stages: an inverted residual of stride 2 with squeeze-and-excitation.

    A depthwise 3×3 with a shortcut stands before and after it, as in the authors' code (the paper only cites
    EfficientViT).

    Args:
        in_channels: Channels of the finer stage.
        out_channels: Channels of the coarser stage.
        norm_cfg: mmcv's config of the norms.
    """

    def __init__(self, in_channels: int, out_channels: int, norm_cfg: dict) -> None:
        super().__init__()
        hidden = 4 * out_channels
        self.conv = nn.Sequential(
            ConvNorm(in_channels, hidden, 1, norm_cfg=norm_cfg, relu=True),
            ConvNorm(hidden, hidden, 3, stride=2, groups=hidden, norm_cfg=norm_cfg, relu=True),
            SqueezeExcite(hidden, rd_ratio=0.25),
            ConvNorm(hidden, out_channels, 1, norm_cfg=norm_cfg),
        )
        self.dwconv1 = ConvNorm(in_channels, in_channels, 3, groups=in_channels, norm_cfg=norm_cfg)
        self.dwconv2 = ConvNorm(out_channels, out_channels, 3, groups=out_channels, norm_cfg=norm_cfg)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, ceil(H/2), ceil(W/2))."""
        x = x + self.dwconv1(x)
        x = self.conv(x)
        return x + self.dwconv2(x)
