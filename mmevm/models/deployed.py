"""The deploy form of the backbone's parts: the same functions with their constants multiplied out, for inference.

BatchNorm disappears into convolutions, convex gates into depthwise kernels and projections, shortcuts around depthwise
convolutions into their kernels. All of it is algebra, done in float64 and rounded to the dtype of each layer's weight,
on its device; the convolutions of maps are packed ones.
LayerNorm keeps its weight and bias: within what follows it they would be no cheaper, as the hidden states would need a
bias that depends on the image.
Maps are (B, C, H, W) in channels_last, where LayerNorm and the products over tokens need no copy.
"""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import Conv2d, Conv3d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .layers import FFN, ConvNorm, M, PatchMerging, Stem, items
from .mixers import HSMSSD
from .packed_conv import PackedConv2d

if TYPE_CHECKING:
    from .efficientvim import Block  # which imports this module


class DeployedStem(nn.Module):
    """The stem without BatchNorm.

    Args:
        stem: What it takes the weights of.
    """

    def __init__(self, stem: Stem) -> None:
        super().__init__()
        check_type(stem, Stem)
        layers = list(items(stem.conv, ConvNorm))
        self.num_relus = len(layers) - 1
        self.conv = nn.Sequential(
            *(_conv(*fold_norm(layer, relu=i < self.num_relus), like=layer.conv) for i, layer in enumerate(layers))
        )

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
        self.mixer = mixer(block.norm, block.mixer, gates[1] / rests[1], like=block.dwconv1.conv.weight)

        weight, bias = _gated_shortcut(block.dwconv2, gates[2], rests[2])
        self.dwconv2 = _conv(_times(weight, rests[1] * rests[3]), bias * rests[3], like=block.dwconv2.conv)

        check_type(block.ffn, FFN)
        weight, bias = fold_norm(block.ffn.fc1, relu=True)
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
        like: A weight of the dtype that the constants shall have.
    """

    def __init__(self, norm: nn.Module, mixer: HSMSSD, ratio: Tensor, like: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.state_dim = mixer.state_dim
        weights = {}
        for name in ('BCdt_proj', 'dw', 'hz_proj', 'out_proj'):
            layer = check_type(getattr(mixer, name), ConvNorm)
            check_type(layer.norm, nn.Identity)
            weights[name], _ = fold_norm(layer)  # the bias is 0 without a norm
        self.BCdt_proj = _conv(weights['BCdt_proj'].unsqueeze(3), None, like=mixer.BCdt_proj.conv)
        self.dw = _conv(weights['dw'], None, like=mixer.dw.conv)
        self.hz_proj = _parameter(weights['hz_proj'].squeeze(2), like)
        self.out_proj = _parameter(_times(weights['out_proj'].squeeze(2), ratio), like)
        self.D = _parameter(mixer.D, like)
        self.ratio = _parameter(ratio.unsqueeze(1), like)

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
        like: A weight of the dtype that the constants shall have.
    """

    def __init__(self, norm: nn.Module, mixer: nn.Module, ratio: Tensor, like: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer
        self.ratio = _parameter(ratio.unflatten(0, (-1, 1, 1)), like)

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

    def __init__(self, downsample: nn.Module) -> None:
        super().__init__()
        downsample = check_type(downsample, PatchMerging)
        expand, dwconv, reduce = (check_type(downsample.conv[i], ConvNorm) for i in (0, 1, 3))
        self.se = downsample.conv[2]
        one = torch.ones((), dtype=torch.float64, device=downsample.dwconv1.conv.weight.device)
        self.dwconv1 = _conv(*_gated_shortcut(downsample.dwconv1, one, one), like=downsample.dwconv1.conv)
        self.fc1 = _conv(*fold_norm(expand, relu=True), like=expand.conv)
        self.dwconv = _conv(*fold_norm(dwconv, relu=True), like=dwconv.conv)
        self.fc2 = _conv(*fold_norm(reduce), like=reduce.conv)
        self.dwconv2 = _conv(*_gated_shortcut(downsample.dwconv2, one, one), like=downsample.dwconv2.conv)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, ceil(H/2), ceil(W/2)), in channels_last."""
        x = F.relu_(self.fc1(self.dwconv1(x)))
        x = self.se(F.relu_(self.dwconv(x)))
        return self.dwconv2(self.fc2(x))


def check_type(module: nn.Module, kind: type[M]) -> M:
    """Return a part, if its deploy form is known.

    Raises:
        TypeError: If ``module`` is not a ``kind``, or a subclass with another forward.
    """
    if not isinstance(module, kind) or type(module).forward is not kind.forward:
        raise TypeError(
            f'A {type(module).__name__} has no deploy form: expected {kind.__name__}, or a subclass with the same '
            'forward. Use the model without switch_to_deploy().'
        )
    return module


def fold_norm(layer: ConvNorm, relu: bool = False) -> tuple[Tensor, Tensor]:
    """Multiply a BatchNorm out into the convolution before it.

    Args:
        layer: Convolution and norm, or no norm.
        relu: Whether a ReLU is expected behind them, in place of nothing.

    Returns:
        Weight and bias of the one convolution that is equal to both in eval mode, in float64.

    Raises:
        TypeError: If the layer is no ``ConvNorm``, or has another activation.
        ValueError: If the norm is another one: what it does depends on the image, and cannot be multiplied out. Or if
            the convolution is not a plain one.
    """
    check_type(layer, ConvNorm)
    check_type(layer.act, nn.ReLU if relu else nn.Identity)
    conv, norm = layer.conv, layer.norm
    is_usual = is_plain(conv) and conv.padding_mode == 'zeros' and set(conv.dilation) == {1}
    if is_usual and conv.bias is None and isinstance(norm, nn.Identity):
        weight = conv.weight.detach().double()
        return weight, weight.new_zeros(len(weight))
    if not is_usual or not can_fold(conv, norm):
        raise ValueError(
            f'{type(conv).__name__} and {type(norm).__name__} cannot be folded into one convolution: expected a plain '
            'convolution, padded with zeros and not dilated, and a BatchNorm with running statistics, both without '
            'hooks (norm_cfg). Use the model without switch_to_deploy().'
        )
    return fold_batch_norm(conv, norm)


def can_fold(conv: nn.Module, norm: nn.Module | None) -> bool:
    """Whether a convolution and the norm behind it are known to be equal to one convolution in eval mode."""
    return (
        is_plain(conv)
        and isinstance(norm, _BatchNorm)
        and type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        and norm.running_mean is not None
        and norm.running_var is not None
        and not _is_changed(norm)
    )


def is_plain(conv: nn.Module) -> bool:
    """Whether a convolution uses its weight as it is: no weight standardisation, parametrisation or hook changes it."""
    return type(conv) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2d, Conv3d) and not _is_changed(conv)


def _is_changed(module: nn.Module) -> bool:
    # Spectral norm, weight norm and pruning set the weight in a hook.
    return bool(module._forward_pre_hooks or module._forward_hooks or 'forward' in vars(module))


def fold_batch_norm(conv: _ConvNd, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float64, of the one convolution that is equal to both in eval mode, if :func:`can_fold`."""
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    bias = -norm.running_mean.double()
    if conv.bias is not None:
        bias = bias + conv.bias.detach().double()
    bias = bias * scale
    if norm.weight is not None:
        scale, bias = scale * norm.weight.detach().double(), bias * norm.weight.detach().double()
    if norm.bias is not None:
        bias = bias + norm.bias.detach().double()
    return _times(conv.weight.detach().double(), scale), bias


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


def _parameter(tensor: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(like.dtype), requires_grad=False)


def _conv(weight: Tensor, bias: Tensor | None, like: _ConvNd) -> PackedConv2d:
    conv = PackedConv2d(
        like.in_channels,
        like.out_channels,
        like.kernel_size[0],  # those of a ConvNorm are square
        like.stride[0],
        like.padding[0],
        groups=like.groups,
        bias=bias is not None,
        device='meta',  # initial values would be replaced
    )
    conv.weight = _parameter(weight.contiguous(memory_format=torch.channels_last), like.weight)
    if bias is not None:
        conv.bias = _parameter(bias, like.weight)
    return conv


def _tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H·W, C), without a copy in channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)
