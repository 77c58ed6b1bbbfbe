"""The deploy form of the backbone's parts: the same functions with their constants multiplied out, for inference.

BatchNorm disappears into convolutions, convex gates into depthwise kernels and projections, shortcuts around depthwise
convolutions into their kernels. All of it is algebra, done in float64; the convolutions of maps are packed ones.
LayerNorm keeps its weight and bias: within what follows it they would be no cheaper, as the hidden states would need a
bias that depends on the image.
Maps are (B, C, H, W) in channels_last, where LayerNorm and the products over tokens need no copy.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .layers import ConvNorm, PatchMerging, Stem, items
from .mixers import HSMSSD
from .packed import PackedConv2d

if TYPE_CHECKING:
    from .efficientvim import Block  # which imports this module


class DeployedStem(nn.Module):
    """The stem without BatchNorm.

    Args:
        stem: What it takes the weights of.
    """

    def __init__(self, stem: Stem) -> None:
        super().__init__()
        layers = items(stem.conv, ConvNorm)
        self.conv = nn.Sequential(*(_conv(*fold_norm(layer), like=layer.conv) for layer in layers))
        self.num_relus = sum(isinstance(layer.act, nn.ReLU) for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, C, ceil(H/16), ceil(W/16)), in channels_last."""
        x = x.contiguous(memory_format=torch.channels_last)
        for i, conv in enumerate(self.conv):
            x = conv(x)
            if i < self.num_relus:
                x = F.relu_(x)
        return x


class DeployedBlock(nn.Module):
    """A block with its gates and BatchNorms multiplied out.

    With the gates g₀…g₃ and the block's steps dw₁, mix, dw₂, ffn, the block is::

        x ← (1−g₀)·x + g₀·dw₁(x)       one depthwise convolution
        x ← (1−g₁)·x + g₁·mix(x)       = (1−g₁)·(x + g₁/(1−g₁)·mix(x)): the factor in front goes into dw₂'s kernel
        x ← (1−g₂)·x + g₂·dw₂(x)       one depthwise convolution, which also multiplies by (1−g₃) for
        x ← (1−g₃)·x + g₃·ffn(x)       whose shortcut so is the bare input

    Args:
        block: What it takes the weights of, with any mixer.
        out_hidden_states: Whether the mixer's hidden states are wanted.
    """

    def __init__(self, block: 'Block', out_hidden_states: bool) -> None:
        super().__init__()
        gates = block.alpha.detach().double().sigmoid()
        rests = (-block.alpha.detach().double()).sigmoid()  # 1 − g, without cancellation
        self.out_hidden_states = out_hidden_states

        self.dwconv1 = _conv(*_gated_shortcut(block.dwconv1, gates[0], rests[0]), like=block.dwconv1.conv)
        mixer: type[DeployedHSMSSD | DeployedMixer] = DeployedHSMSSD if type(block.mixer) is HSMSSD else DeployedMixer
        self.mixer = mixer(block.norm, block.mixer, gates[1] / rests[1])

        weight, bias = _gated_shortcut(block.dwconv2, gates[2], rests[2])
        self.dwconv2 = _conv(_times(weight, rests[1] * rests[3]), bias * rests[3], like=block.dwconv2.conv)

        weight, bias = fold_norm(block.ffn.fc1)
        self.fc1 = _conv(weight / rests[3].view(-1, 1, 1), bias, like=block.ffn.fc1.conv)
        weight, bias = fold_norm(block.ffn.fc2)
        self.fc2 = _conv(_times(weight, gates[3]), bias * gates[3], like=block.ffn.fc2.conv)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """As ``Block``: (B, C, H, W) to the same, and the hidden states (B, C, N) if they are wanted."""
        x, h = self.mixer(self.dwconv1(x), self.out_hidden_states)
        x = self.dwconv2(x)
        return self.fc2(F.relu_(self.fc1(x))).add_(x), h


class DeployedHSMSSD(nn.Module):
    """The norm, HSM-SSD, and the shortcut around them: x + r·HSMSSD(norm(x)).

    ``A``, which no output depends on, is gone.

    Args:
        norm: The norm before the mixer.
        mixer: The mixer.
        ratio: r of each channel, (D,), in float64.
    """

    def __init__(self, norm: nn.Module, mixer: HSMSSD, ratio: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.state_dim = mixer.state_dim
        self.BCdt_proj = _conv(mixer.BCdt_proj.conv.weight.unsqueeze(3), None, like=mixer.BCdt_proj.conv)
        self.dw = _conv(mixer.dw.conv.weight, None, like=mixer.dw.conv)
        self.hz_proj = _parameter(mixer.hz_proj.conv.weight.squeeze(2))
        self.out_proj = _parameter(_times(mixer.out_proj.conv.weight.detach().double().squeeze(2), ratio))
        self.D = _parameter(mixer.D)
        self.ratio = _parameter(ratio.unsqueeze(1))

    def forward(self, x: Tensor, out_hidden_states: bool) -> tuple[Tensor, Tensor | None]:
        """(B, D, H, W), L = H·W, to the same in channels_last, and the hidden states (B, D, N) if they are wanted."""
        normed = self.norm(x)
        b, c, dt = self.dw(self.BCdt_proj(normed)).flatten(2).split(self.state_dim, dim=1)  # 3 × (B, N, L)
        a = F.softmax(dt, dim=-1, dtype=torch.promote_types(dt.dtype, torch.float32))  # (B, N, L)
        h = (a * b).to(x.dtype) @ _tokens(normed)  # (B, N, D)
        h = self.mix_states(h)  # (B, D, N)
        y = torch.baddbmm(_tokens(x), c.transpose(1, 2).to(h.dtype), h.transpose(1, 2))  # (B, L, D)
        y = y.view(len(x), *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
        return y, h / self.ratio if out_hidden_states else None

    def mix_states(self, h: Tensor) -> Tensor:
        """As ``HSMSSD.mix_states``, but of (B, N, D) to (B, D, N)."""
        # The states of all images are columns: with so few of them, BLAS likes the weights on the left.
        h, z = (self.hz_proj @ h.flatten(0, 1).t()).chunk(2)  # 2 × (D', B·N)
        h = self.out_proj @ (h * (F.silu(z) + self.D))  # (D, B·N)
        return h.unflatten(1, (-1, self.state_dim)).transpose(0, 1)


class DeployedMixer(nn.Module):
    """Any other norm and mixer, as they are, and the shortcut around them: x + r·mixer(norm(x)).

    Args:
        norm: The norm before the mixer.
        mixer: The mixer.
        ratio: r of each channel, (D,).
    """

    def __init__(self, norm: nn.Module, mixer: nn.Module, ratio: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer
        self.ratio = _parameter(ratio.unflatten(0, (-1, 1, 1)))

    def forward(self, x: Tensor, out_hidden_states: bool) -> tuple[Tensor, Tensor | None]:
        """(B, D, H, W) to the same in channels_last, and the mixer's hidden states if they are wanted."""
        y, h = self.mixer(self.norm(x))
        x = torch.addcmul(x, self.ratio, y).contiguous(memory_format=torch.channels_last)
        return x, h if out_hidden_states else None


class DeployedPatchMerging(nn.Module):
    """The down-sampling without BatchNorm, its shortcuts within the depthwise convolutions that they surround.

    Args:
        downsample: What it takes the weights of.
    """

    def __init__(self, downsample: PatchMerging) -> None:
        super().__init__()
        expand, dwconv, reduce = (layer for layer in downsample.conv if isinstance(layer, ConvNorm))
        self.se = downsample.conv[2]
        one = torch.ones(())
        self.dwconv1 = _conv(*_gated_shortcut(downsample.dwconv1, one, one), like=downsample.dwconv1.conv)
        self.fc1 = _conv(*fold_norm(expand), like=expand.conv)
        self.dwconv = _conv(*fold_norm(dwconv), like=dwconv.conv)
        self.fc2 = _conv(*fold_norm(reduce), like=reduce.conv)
        self.dwconv2 = _conv(*_gated_shortcut(downsample.dwconv2, one, one), like=downsample.dwconv2.conv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, ceil(H/2), ceil(W/2)), in channels_last."""
        x = F.relu_(self.fc1(self.dwconv1(x)))
        x = self.se(F.relu_(self.dwconv(x)))
        return self.dwconv2(self.fc2(x))


def fold_norm(layer: ConvNorm) -> tuple[Tensor, Tensor]:
    """Multiply a BatchNorm out into the convolution before it.

    Args:
        layer: Convolution and norm, or no norm.

    Returns:
        Weight and bias of the one convolution that is equal to both in eval mode, in float64.

    Raises:
        ValueError: If the norm is another one: what it does depends on the image, and cannot be multiplied out.
    """
    weight, norm = layer.conv.weight.detach().double(), layer.norm
    if isinstance(norm, nn.Identity):
        return weight, weight.new_zeros(len(weight))
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        raise ValueError(f'{type(norm).__name__} cannot be folded into a convolution: only a BatchNorm can (norm_cfg).')
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    bias = -norm.running_mean.double() * scale
    if norm.affine:
        scale = scale * norm.weight.detach().double()
        bias = bias * norm.weight.detach().double() + norm.bias.detach().double()
    return _times(weight, scale), bias


def _gated_shortcut(layer: ConvNorm, gate: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """rest·x + gate·layer(x) as one depthwise convolution."""
    weight, bias = fold_norm(layer)
    weight = _times(weight, gate.expand(len(weight)))
    centre = weight.shape[-1] // 2
    weight[:, 0, centre, centre] += rest.to(weight)
    return weight, bias * gate.to(bias)


def _times(weight: Tensor, factor: Tensor) -> Tensor:
    """A weight times a factor for each of its outputs."""
    return weight * factor.to(weight).view(-1, *[1] * (weight.ndim - 1))


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().float(), requires_grad=False)


def _conv(weight: Tensor, bias: Tensor | None, like: _ConvNd) -> PackedConv2d:
    conv = PackedConv2d(
        like.in_channels,
        like.out_channels,
        like.kernel_size[0],  # those of a ConvNorm are square
        like.stride[0],
        like.padding[0],
        groups=like.groups,
        bias=bias is not None,
    )
    conv.weight = _parameter(weight.contiguous(memory_format=torch.channels_last))
    if bias is not None:
        conv.bias = _parameter(bias)
    return conv


def _tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H·W, C), without a copy in channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)
