"""Hidden state mixer-based state space duality (HSM-SSD), the token mixer of the paper, and its deploy mode.

Symbols, in the paper's terms (Sec. 2–3, Algorithm 1), for L tokens of D channels and N hidden states:

- ``B`` (N, L): input projection, how much each token adds to each hidden state (B̂ in Eq. 5).
- ``C`` (N, L): output projection, how each token reads its output from the hidden states (Eq. 11).
- ``dt`` (N, L): the step size Δ. The importance ``a`` of the tokens is its softmax over the tokens (Eq. 6).
- ``A`` (N,): the state transition â, added to ``dt`` in the paper. The softmax cancels it.
- ``h`` (D, N): hidden states, weighted sums of all tokens (Eq. 14).
- ``z`` (D, N): gate of the hidden states, used as SiLU(z) (Eq. 11).
- ``D``, the parameter: weight of a skip connection around the gate, a scalar. Elsewhere D is the number of channels.
- ``BCdt_proj``, ``dw``: 1×1 projection of the tokens to B, C and dt, then a depthwise 3×3 convolution of all three.
- ``hz_proj``: W_in (Eq. 10) and W_z (Eq. 11) in one projection, from the weighted sums to h and z.
- ``out_proj``: W_out (Eq. 11).

To add a mixer, write a class with the signatures ``__init__(channels, state_dim, …)`` and
``forward(x) -> (y, hidden_states)``, decorate it with ``@mmevm.registry.MODELS.register_module()`` and select it by
``EfficientViM(mixer_cfg=dict(type='mmevm.Name', …))``. It works in deploy mode as it is (:class:`DeployMixer`).

To change :class:`HSMSSD` itself, also change:

- :class:`DeployHSMSSD` below, its deploy mode, whose outputs must stay equal;
- :class:`~mmevm.models.ablations.MultiHeadHSMSSD`, which inherits from it;
- the recorded outputs: ``python tests/helpers/regenerate_golden.py --write --reason '…'``;
- if parameter names or shapes change: ``mmevm/checkpoints/convert.py``, as checkpoints of the authors and of timm no
  longer fit;
- the parameters and MACs in ``docs/dev/ablations.md`` and in the tests that compare with it, and in ``metafile.yml``;
- if a new operator appears: ``mmevm/analysis/complexity.py``, which counts it, and the ONNX export tests.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmevm.registry import MODELS

from .fuse import check_type, make_constant, make_conv, scale_outputs
from .layers import ConvNorm, fold_conv_norm


@MODELS.register_module()
class HSMSSD(nn.Module):
    """Mix tokens through a few hidden states, and channels on these states only (paper, Sec. 3.1–3.2, Algorithm 1).

    Each of N hidden states is a weighted sum of all L tokens (Eq. 14). The gate and the output projection, which other
    mixers apply to every token, act on the N states (Eq. 11), and each token then reads its output from the states:
    O(N·D² + L·N·D) instead of O(L·D²).

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
        # The softmax over tokens cancels A: no output depends on it. It is kept because checkpoints contain it, and
        # without a gradient because DDP would report it as unused.
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


class DeployHSMSSD(nn.Module):
    """Deploy mode of ``HSMSSD`` with its norm, gate and shortcut: ``x + ratio·HSMSSD(norm(x))``, without ``A``.

    Args:
        norm: The norm before the mixer.
        mixer: The trained mixer.
        ratio: Factor of each channel, (D,), in float64.
        like: A parameter with the dtype that the constants should have.
    """

    def __init__(self, norm: nn.Module, mixer: HSMSSD, ratio: Tensor, like: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.state_dim = mixer.state_dim
        weights = {}
        for name in ('BCdt_proj', 'dw', 'hz_proj', 'out_proj'):
            layer = check_type(getattr(mixer, name), ConvNorm)
            check_type(layer.norm, nn.Identity)
            weights[name], _ = fold_conv_norm(layer)  # the bias is 0 without a norm
        self.BCdt_proj = make_conv(weights['BCdt_proj'].unsqueeze(3), None, like=mixer.BCdt_proj.conv)
        self.dw = make_conv(weights['dw'], None, like=mixer.dw.conv)
        self.hz_proj = make_constant(weights['hz_proj'].squeeze(2), like)
        self.out_proj = make_constant(scale_outputs(weights['out_proj'].squeeze(2), ratio), like)
        self.D = make_constant(mixer.D, like)
        self.ratio = make_constant(ratio.unsqueeze(1), like)

    def forward(self, x: Tensor, out_hidden_states: bool) -> tuple[Tensor, Tensor | None]:
        """(B, D, H, W), L = H·W, to the same in channels_last, and the hidden states (B, D, N) if requested."""
        normed = self.norm(x)
        b, c, dt = self.dw(self.BCdt_proj(normed)).flatten(2).split(self.state_dim, dim=1)  # 3 × (B, N, L)
        a = F.softmax(dt, dim=-1, dtype=torch.promote_types(dt.dtype, torch.float32))  # (B, N, L)
        h = (a * b).to(x.dtype) @ _tokens(normed)  # (B, N, D)
        h = self.mix_states(h)  # (B, D, N)
        y = torch.baddbmm(_tokens(x), c.transpose(1, 2).to(h.dtype), h.transpose(1, 2))  # (B, L, D)
        y = y.view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
        return y, h / self.ratio if out_hidden_states else None

    def mix_states(self, h: Tensor) -> Tensor:
        """Like ``HSMSSD.mix_states``, but from (B, N, D) to (B, D, N)."""
        # The states of all images are columns: with so few of them, BLAS is faster with the weights on the left.
        h, z = (self.hz_proj @ h.flatten(0, 1).t()).chunk(2)  # 2 × (D', B·N)
        h = self.out_proj @ (h * (F.silu(z) + self.D))  # (D, B·N)
        return h.unflatten(1, (-1, self.state_dim)).transpose(0, 1)


class DeployMixer(nn.Module):
    """Deploy mode of any other mixer, unchanged, with its norm, gate and shortcut: ``x + ratio·mixer(norm(x))``.

    Args:
        norm: The norm before the mixer.
        mixer: The trained mixer.
        ratio: Factor of each channel, (D,), in float64.
        like: A parameter with the dtype that the constants should have.
    """

    def __init__(self, norm: nn.Module, mixer: nn.Module, ratio: Tensor, like: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer
        self.ratio = make_constant(ratio.unflatten(0, (-1, 1, 1)), like)

    def forward(self, x: Tensor, out_hidden_states: bool) -> tuple[Tensor, Tensor | None]:
        """(B, D, H, W) to the same in channels_last, and the mixer's hidden states if requested."""
        y, h = self.mixer(self.norm(x))
        x = torch.addcmul(x, self.ratio, y).contiguous(memory_format=torch.channels_last)
        return x, h if out_hidden_states else None


def make_deploy_mixer(norm: nn.Module, mixer: nn.Module, ratio: Tensor, like: Tensor) -> DeployHSMSSD | DeployMixer:
    """Return the deploy mode of a mixer. Subclasses of ``HSMSSD`` may compute something else and stay unchanged."""
    if type(mixer) is HSMSSD:
        return DeployHSMSSD(norm, mixer, ratio, like)
    return DeployMixer(norm, mixer, ratio, like)


def _tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H·W, C), without a copy in channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)
