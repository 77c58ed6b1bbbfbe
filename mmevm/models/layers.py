"""Layers of EfficientViM in the order in which an image passes them: stem, LayerNorm, FFN, downsampling.

Attribute names are those of the authors' checkpoints.

Below each layer stands its deploy mode: the same function for inference, with BatchNorm and residual connections folded
into the convolutions (:mod:`mmevm.models.fuse`). Change the two together. Its constructor takes the trained layer; its
maps are (B, C, H, W) in channels_last, where LayerNorm and products over tokens need no copy.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from mmcv.cnn import build_conv_layer, build_norm_layer
from mmcv.cnn.bricks.conv_module import efficient_conv_bn_eval_forward
from timm.layers import SqueezeExcite
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from mmevm.registry import MODELS

from .fuse import M, check_type, fold_norm, fuse_gated_residual, make_conv


def cast_modules(container: nn.ModuleList | nn.Sequential, kind: type[M]) -> Iterable[M]:
    """Return the modules of a container under their type, which torch's annotations do not keep."""
    return cast('Iterable[M]', container)


class ConvNorm(nn.Module):
    """Convolution without bias, optional norm, optional ReLU.

    Padding keeps the size (stride 1) or gives ``ceil(size / stride)``. mmcv's ``ConvModule`` names its norm after the
    norm's type (``bn``); checkpoints call it ``norm``.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the kernel, odd.
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
            # The same gradients; autograd keeps the activations of one operation in place of two.
            return self.act(efficient_conv_bn_eval_forward(self.norm, self.conv, x))
        return self.act(self.norm(self.conv(x)))

    def _has_fixed_statistics(self) -> bool:
        norm = self.norm
        return isinstance(norm, _BatchNorm) and not norm.training and norm.running_var is not None


def fold_conv_norm(layer: nn.Module, relu: bool = False) -> tuple[Tensor, Tensor]:
    """Fold a ``ConvNorm`` into one convolution: its deploy mode.

    Args:
        layer: The layer.
        relu: Whether a ReLU is expected in it. The caller applies it.

    Returns:
        Weight and bias, in float64.

    Raises:
        TypeError: If the layer is not a ``ConvNorm``, or has another activation.
        ValueError: If its norm is not a BatchNorm, or its convolution is not a plain one.
    """
    layer = check_type(layer, ConvNorm)
    check_type(layer.act, nn.ReLU if relu else nn.Identity)
    return fold_norm(layer.conv, layer.norm)


class Stem(nn.Module):
    """Four 3×3 convolutions of stride 2: an image becomes tokens of 16×16 pixels (paper, Fig. 4).

    Args:
        in_channels: Channels of the image.
        embed_dims: Channels of the tokens, a multiple of 8.
        norm_cfg: mmcv's config of the norms.
        out_indices: Convolutions among the first three whose maps are returned as well, ascending.
    """

    def __init__(self, in_channels: int, embed_dims: int, norm_cfg: dict, out_indices: Sequence[int] = ()) -> None:
        super().__init__()
        self.out_indices = tuple(out_indices)
        widths = [in_channels, embed_dims // 8, embed_dims // 4, embed_dims // 2, embed_dims]
        self.conv = nn.Sequential(
            *(
                ConvNorm(widths[i], widths[i + 1], 3, stride=2, norm_cfg=norm_cfg, relu=i < 3)
                for i in range(len(widths) - 1)
            )
        )

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Make tokens.

        Args:
            x: Images, (B, in_channels, H, W).

        Returns:
            The tokens, (B, embed_dims, ceil(H/16), ceil(W/16)). With ``out_indices``, a tuple: the maps of these
            convolutions after ReLU, (B, embed_dims·s/16, ceil(H/s), ceil(W/s)) with s = 2, 4 or 8, then the tokens.
        """
        if not self.out_indices:
            return self.conv(x)
        maps = []
        for i, conv in enumerate(self.conv):
            x = conv(x)
            if i in self.out_indices:
                maps.append(x)
        return (*maps, x)


class DeployStem(nn.Module):
    """``Stem`` without BatchNorm.

    Args:
        stem: The trained layer.
    """

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        stem = check_type(stem, Stem)
        layers = list(cast_modules(stem.conv, ConvNorm))
        self.out_indices = stem.out_indices
        self.num_relus = len(layers) - 1
        self.conv = nn.Sequential(
            *(make_conv(*fold_conv_norm(x, relu=i < self.num_relus), like=x.conv) for i, x in enumerate(layers))
        )

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return what ``Stem`` returns, in channels_last."""
        x = x.contiguous(memory_format=torch.channels_last)
        maps = []
        for i, conv in enumerate(self.conv):
            x = conv(x)
            if i < self.num_relus:
                x = F.relu_(x)
            if i in self.out_indices:
                maps.append(x)
        return (*maps, x) if maps else x


@MODELS.register_module()
class LayerNorm2d(nn.Module):
    """LayerNorm over the channels of each pixel of a (B, C, H, W) map.

    The statistics are computed in at least float32 and the output has the dtype of the input, whatever autocast and the
    backend do: squares of features of 1e4 overflow float16, and bfloat16 has too few digits for the mean. timm's
    ``LayerNorm2d`` leaves both to the backend, and its ``LayerNorm2dFp32`` rounds float64 to float32.

    It keeps its weight and bias in deploy mode: folding them into the mixer would save nothing, as the hidden states
    would need a bias that depends on the image.

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
        """(B, C, H, W) to (B, C, H, W)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        y = F.layer_norm(x.permute(0, 2, 3, 1).to(dtype), weight.shape, weight, bias, self.eps)
        return y.permute(0, 3, 1, 2).to(x.dtype)


class FFN(nn.Module):
    """Two 1×1 convolutions with a ReLU between them, which mix the channels of each pixel.

    In deploy mode the block's gates are folded into both convolutions: see
    :class:`~mmevm.models.efficientvim.DeployBlock`.

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
        """(B, C, H, W) to (B, C, H, W)."""
        return self.fc2(self.fc1(x))


class PatchMerging(nn.Module):
    """Downsampling between two stages: an inverted residual of stride 2 with squeeze-and-excitation.

    A depthwise 3×3 convolution with a shortcut stands before and after it, as in the authors' code (the paper only
    cites EfficientViT).

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


class DeployPatchMerging(nn.Module):
    """``PatchMerging`` without BatchNorm, its shortcuts folded into the depthwise convolutions.

    Args:
        merging: The trained layer.
    """

    def __init__(self, merging: nn.Module) -> None:
        super().__init__()
        merging = check_type(merging, PatchMerging)
        expand, dwconv, reduce = (check_type(merging.conv[i], ConvNorm) for i in (0, 1, 3))
        self.se = merging.conv[2]
        self.dwconv1 = self._fuse_shortcut(merging.dwconv1)
        self.fc1 = make_conv(*fold_conv_norm(expand, relu=True), like=expand.conv)
        self.dwconv = make_conv(*fold_conv_norm(dwconv, relu=True), like=dwconv.conv)
        self.fc2 = make_conv(*fold_conv_norm(reduce), like=reduce.conv)
        self.dwconv2 = self._fuse_shortcut(merging.dwconv2)

    @staticmethod
    def _fuse_shortcut(layer: ConvNorm) -> nn.Module:
        weight, bias = fold_conv_norm(layer)
        one = weight.new_ones(())
        return make_conv(*fuse_gated_residual(weight, bias, gate=one, shortcut=one), like=layer.conv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, ceil(H/2), ceil(W/2)), in channels_last."""
        x = F.relu_(self.fc1(self.dwconv1(x)))
        x = self.se(F.relu_(self.dwconv(x)))
        return self.dwconv2(self.fc2(x))
