"""The mixers with which the paper compares HSM-SSD (Supplement C, Table C), selected by ``mixer_cfg``.

Each differs more from HSM-SSD than the one before: without importance per state, without channel mixing on the hidden
states, without hidden states. All have the signatures that :mod:`mmevm.models.mixers` describes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmevm.registry import MODELS

from .layers import ConvNorm
from .mixers import HSMSSD


@MODELS.register_module()
class MultiHeadHSMSSD(HSMSSD):
    """HSM-SSD with one importance of the tokens per head instead of one per state (paper, Table C, E and F).

    In this "multi-input SSD" (Sec. 3.2) the heads, groups of adjacent channels, share B and C. Everything else is as in
    :class:`~mmevm.models.mixers.HSMSSD`, except that there is no ``A``, as no checkpoint contains it.

    Args:
        channels: D, channels of a token.
        state_dim: N, number of hidden states.
        ssd_expand: Channels of a hidden state between its two projections, relative to ``channels``.
        head_dim: Channels of a head, (E); None is a single head of all channels, a ∈ R^L, (F).

    Raises:
        ValueError: If ``ssd_expand`` leaves no channel, or ``head_dim`` does not divide the channels.
    """

    def __init__(self, channels: int, state_dim: int, ssd_expand: float = 1.0, head_dim: int | None = 32) -> None:
        super().__init__(channels, state_dim, ssd_expand)
        self.A = None
        self.splits = (state_dim, state_dim, _count_heads(channels, head_dim))
        self.BCdt_proj = ConvNorm(channels, sum(self.splits), 1, conv_cfg=dict(type='Conv1d'))
        self.dw = ConvNorm(sum(self.splits), sum(self.splits), 3, groups=sum(self.splits))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the tokens of a feature map.

        Args:
            x: (B, D, H, W), any size; L = H·W.

        Returns:
            The mixed map (B, D, H, W) and the hidden states (B, D, N).
        """
        size = x.shape[2:]
        x = x.flatten(2)  # (B, D, L)
        bcdt = self.dw(self.BCdt_proj(x).unflatten(2, size))
        b, c, dt = bcdt.flatten(2).split(self.splits, dim=1)  # 2 × (B, N, L), (B, heads, L)
        h = _weigh(x, dt) @ b.transpose(1, 2)  # (B, D, N), Eq. 4 of each head
        h = self.mix_states(h)  # (B, D, N)
        y = h @ c  # (B, D, L), Eq. 11
        return y.unflatten(2, size), h


@MODELS.register_module()
class NCSSD(nn.Module):
    """Non-causal state space duality, from which HSM-SSD is derived (paper, Eq. 4–9; Table C, C).

    It mixes channels on the tokens, before and after the hidden states, which takes O(L·D²). As in HSM-SSD, the gate
    has a skip weighted by D and the importance is a softmax over the tokens; Proposition 1 says when the two are equal.
    As in Eq. 7, the depthwise convolution takes B, C and x, not dt, and no activation follows it.

    Args:
        channels: D, channels of a token.
        state_dim: N, number of hidden states.
        head_dim: Channels of a head. Each head has its own importance of the tokens; all share B and C. None is a
            single head of all channels.

    Raises:
        ValueError: If ``head_dim`` does not divide the channels.
    """

    def __init__(self, channels: int, state_dim: int, head_dim: int | None = 32) -> None:
        super().__init__()
        bcx = 2 * state_dim + channels
        self.splits = (bcx, _count_heads(channels, head_dim), channels)
        self.state_dim = state_dim
        self.BCxdtz_proj = ConvNorm(channels, sum(self.splits), 1)
        self.dw = ConvNorm(bcx, bcx, 3, groups=bcx)
        self.out_proj = ConvNorm(channels, channels, 1)
        self.D = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the tokens of a feature map.

        Args:
            x: (B, D, H, W), any size; L = H·W.

        Returns:
            The mixed map (B, D, H, W) and the hidden states (B, D, N).
        """
        bcx, dt, z = self.BCxdtz_proj(x).split(self.splits, dim=1)  # Eq. 5
        b, c, x = self.dw(bcx).flatten(2).tensor_split((self.state_dim, 2 * self.state_dim), dim=1)  # (B, …, L), Eq. 7
        h = _weigh(x, dt.flatten(2)) @ b.transpose(1, 2)  # (B, D, N), Eq. 4 of each head
        y = (h @ c).view_as(z)  # (B, D, H, W), Eq. 8
        return self.out_proj(y * (F.silu(z) + self.D)), h  # Eq. 9 with a skip weighted by D


@MODELS.register_module()
class SelfAttention(nn.Module):
    """Softmax self-attention of all tokens, O(L·D² + L²·D) (paper, Table 1; Table C, D).

    Args:
        channels: D, channels of a token.
        state_dim: Not used, as there are no hidden states; every mixer gets it.
        head_dim: Channels of a head; None is a single head of all channels.

    Raises:
        ValueError: If ``head_dim`` does not divide the channels.
    """

    def __init__(self, channels: int, state_dim: int, head_dim: int | None = 32) -> None:
        super().__init__()
        self.num_heads = _count_heads(channels, head_dim)
        self.qkv_proj = ConvNorm(channels, 3 * channels, 1)
        self.out_proj = ConvNorm(channels, channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Mix the tokens of a feature map.

        Args:
            x: (B, D, H, W), any size; L = H·W.

        Returns:
            The mixed map (B, D, H, W), and None instead of hidden states.
        """
        qkv = self.qkv_proj(x).flatten(2).unflatten(1, (3, self.num_heads, -1))  # (B, 3, heads, D/heads, L)
        q, k, v = qkv.transpose(3, 4).unbind(1)  # 3 × (B, heads, L, D/heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(y.transpose(2, 3).reshape(x.shape)), None


def _count_heads(channels: int, head_dim: int | None) -> int:
    if head_dim is None:
        return 1
    if head_dim < 1 or channels % head_dim:
        raise ValueError(
            f'head_dim={head_dim} does not divide {channels} channels into heads: give a divisor of {channels}, or '
            'None for a single head.'
        )
    return channels // head_dim


def _weigh(x: Tensor, dt: Tensor) -> Tensor:
    """Multiply tokens x (B, D, L) by their importance in each head, the softmax over tokens of dt (B, heads, L).

    Eq. 4 multiplies B by it. Here x is multiplied, which has the heads; the sum over tokens of x·B is the same.
    """
    # At least float32: an importance is about 1/L, near the smallest number of float16 on a large image.
    a = F.softmax(dt, dim=-1, dtype=torch.promote_types(dt.dtype, torch.float32))
    return (x.unflatten(1, (a.shape[1], -1)) * a.unsqueeze(2)).flatten(1, 2).to(x.dtype)
