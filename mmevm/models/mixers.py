"""The token mixer that the paper is about: hidden state mixer-based state space duality (HSM-SSD).

A mixer of one's own needs the same two signatures, ``Mixer(channels, state_dim, …)`` and
``forward(x) -> (y, hidden_states)``, and ``@mmevm.registry.MODELS.register_module()`` before it; then
``EfficientViM(mixer_cfg=dict(type='mmevm.Mixer', …))`` builds one for each block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmevm.registry import MODELS

from .layers import ConvNorm


@MODELS.register_module()
class HSMSSD(nn.Module):
    """Mixes tokens through a few hidden states, and channels on these states only (paper, Sec. 3.1–3.2, Algorithm 1).

    Each of N hidden states is a weighted sum of all L tokens (Eq. 14). The gate and the output projection, which other
    mixers apply to every token, act on the N states (Eq. 11), and each token then reads its output from the states:
    O(N·D² + L·N·D) in place of O(L·D²).

    Args:
        channels: D, channels of a token.
        state_dim: N, number of hidden states.
        ssd_expand: Channels of a hidden state between its two projections, relative to ``channels``.

    Raises:
        ValueError: If ``ssd_expand`` leaves no channel.
    """

    def __init__(self, channels: int, state_dim: int, ssd_expand: float = 1.0) -> None:
        super().__init__()
        inner = int(ssd_expand * channels)
        if inner < 1:
            raise ValueError(f'ssd_expand={ssd_expand} of {channels} channels leaves none: give a larger number.')
        conv1d = dict(type='Conv1d')
        self.state_dim = state_dim
        self.BCdt_proj = ConvNorm(channels, 3 * state_dim, 1, conv_cfg=conv1d)
        self.dw = ConvNorm(3 * state_dim, 3 * state_dim, 3, groups=3 * state_dim)
        self.hz_proj = ConvNorm(channels, 2 * inner, 1, conv_cfg=conv1d)
        self.out_proj = ConvNorm(inner, channels, 1, conv_cfg=conv1d)
        # The paper's â is the same for all tokens, so the softmax over tokens cancels it: no output depends on it. It
        # is kept, without a gradient, because checkpoints hold it; with one, DDP would call it unused.
        self.A: nn.Parameter | None
        self.A = nn.Parameter(torch.empty(state_dim).uniform_(1, 16), requires_grad=False)
        self.D = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the tokens of a feature map.

        Args:
            x: (B, D, H, W), any size; L = H·W.

        Returns:
            The mixed map (B, D, H, W) and the hidden states (B, D, N).
        """
        batch, channels, height, width = x.shape
        x = x.flatten(2)  # (B, D, L)
        bcdt = self.BCdt_proj(x).reshape(batch, 3 * self.state_dim, height, width)
        b, c, dt = self.dw(bcdt).flatten(2).split(self.state_dim, dim=1)  # 3 × (B, N, L)
        # At least float32: an importance is about 1/L, near the smallest number of float16 on a large image.
        a = F.softmax(dt, dim=-1, dtype=torch.promote_types(dt.dtype, torch.float32))  # (B, N, L)
        h = x @ (a * b).to(x.dtype).transpose(1, 2)  # (B, D, N), Eq. 14
        h = self.mix_states(h)  # (B, D, N)
        y = h @ c  # (B, D, L), Eq. 11
        return y.reshape(batch, channels, height, width), h

    def mix_states(self, h: Tensor) -> Tensor:
        """Mix the channels of the hidden states (B, D, N): the hidden state mixer, f(h) of Eq. 11."""
        h, z = self.hz_proj(h).chunk(2, dim=1)  # 2 × (B, D', N)
        return self.out_proj(h * (F.silu(z) + self.D))  # (B, D, N), with a skip weighted by D
