"""EfficientViM: Efficient Vision Mamba with Hidden State Mixer based State Space Duality (CVPR 2025).

Paper: https://arxiv.org/abs/2411.15241. Where the paper and the authors' code differ, this follows the code, from which
their numbers and weights came.
"""

import contextlib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from mmevm.compat import is_autocast_enabled, is_compiling
from mmevm.registry import MODELS

from .deployed import DeployedBlock, DeployedPatchMerging, DeployedStem, check_type
from .layers import FFN, ConvNorm, PatchMerging, Stem, items
from .weight_init import init_from_checkpoints, pretrained_cfgs

_POSITIONS_AT_ONCE = 4 * 32**2  # of a map, in the deploy form on a CPU: docs/performance.md


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class Block(nn.Module):
    """Depthwise conv, HSM-SSD, depthwise conv, FFN, each behind a convex gate (paper, Sec. 3.3 and Fig. 4).

    ``x ← (1 − g)·x + g·f(x)`` with ``g = sigmoid(alpha)`` per channel. The paper calls it layer scale, but it weighs
    the shortcut too and starts near one half.

    Args:
        channels: C, of input and output.
        state_dim: Number of hidden states of the mixer.
        mlp_ratio: Hidden channels of the FFN, relative to C.
        drop_path: Probability with which a sample skips one of the four steps in training.
        norm_cfg: mmcv's config of all norms but that before the mixer.
        mixer_cfg: Type of the mixer, and its arguments but for ``channels`` and ``state_dim``.
        mixer_norm_cfg: mmcv's config of the norm before the mixer.
    """

    def __init__(
        self,
        channels: int,
        state_dim: int,
        mlp_ratio: float,
        drop_path: float,
        norm_cfg: dict,
        mixer_cfg: dict,
        mixer_norm_cfg: dict,
    ) -> None:
        super().__init__()
        self.dwconv1 = ConvNorm(channels, channels, 3, groups=channels, norm_cfg=norm_cfg)
        self.norm = build_norm_layer(mixer_norm_cfg, channels)[1]
        self.mixer = MODELS.build(dict(mixer_cfg, channels=channels, state_dim=state_dim))
        self.dwconv2 = ConvNorm(channels, channels, 3, groups=channels, norm_cfg=norm_cfg)
        self.ffn = FFN(channels, int(mlp_ratio * channels), norm_cfg)
        self.alpha = nn.Parameter(torch.full((4, channels), 1e-4))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Transform a feature map.

        Args:
            x: (B, C, H, W).

        Returns:
            The map, (B, C, H, W), and the mixer's hidden states, (B, C, N); None if it has none.
        """
        gates = self.alpha.sigmoid().unflatten(1, (-1, 1, 1))  # (4, C, 1, 1)
        x = self._gate(x, self.dwconv1(x), gates[0])
        y, h = self.mixer(self.norm(x))
        x = self._gate(x, y, gates[1])
        x = self._gate(x, self.dwconv2(x), gates[2])
        x = self._gate(x, self.ffn(x), gates[3])
        return x, h

    def _gate(self, x: Tensor, fx: Tensor, gate: Tensor) -> Tensor:
        # A dropped path is a closed gate, and the scale that keeps the expectation belongs to the gate as well.
        gate = self.drop_path(gate.expand(len(x), -1, -1, -1))
        return torch.lerp(x, fx.to(x.dtype), gate.to(x.dtype))


class Stage(nn.Module):
    """Blocks at one resolution, and the down-sampling towards the next stage.

    A dense prediction takes the blocks' map before the down-sampling, so ``forward`` leaves that to its caller.

    Args:
        blocks: The blocks, in order.
        downsample: What leads to the next stage; None in the last one.
        with_cp: Whether blocks are recomputed in the backward pass of training in place of keeping their activations.
    """

    def __init__(self, blocks: Sequence[Block], downsample: PatchMerging | None, with_cp: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample: PatchMerging | DeployedPatchMerging | None = downsample
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the blocks.

        Args:
            x: (B, C, H, W).

        Returns:
            The last block's map, (B, C, H, W), and its hidden states, (B, C, N); None if its mixer has none.
        """
        for block in self.blocks:
            if self.with_cp and self.training and torch.is_grad_enabled():
                x, h = _checkpoint(block, x)
            else:
                x, h = block(x)
        return x, h


# torch.compile cannot trace context_fn, and without it older versions fail at BatchNorm's running statistics (2.3), as
# does its eager backend in 2.14.
@torch.compiler.disable
def _checkpoint(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    return checkpoint(block, x, use_reentrant=False, context_fn=partial(_contexts, block))


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Those of a block's forward, and of the same forward again in the backward pass."""
    return contextlib.nullcontext(), _RunningStatsKept(block)


class _RunningStatsKept(AbstractContextManager):
    """Lets BatchNorm move copies of its running statistics: a recomputed forward must not move them a second time.

    It can be entered again, as each backward pass through a retained graph recomputes.
    """

    def __init__(self, module: nn.Module) -> None:
        self.norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]

    def __enter__(self) -> None:
        self.kept = [m._buffers for m in self.norms]
        for m in self.norms:
            m._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in m._buffers.items()}

    def __exit__(self, *error: object) -> None:
        for m, buffers in zip(self.norms, self.kept, strict=True):
            m._buffers = buffers


@MODELS.register_module()
class EfficientViM(BaseModule):
    """EfficientViM as a multi-scale backbone.

    ::

        image ─ patch_embed ─ stages[0] ┬ downsample ─ stages[1] ┬ downsample ─ stages[2] ┐
        (4 convs of stride 2)           │                        │                        │
                              stride 16 ▼              stride 32 ▼              stride 64 ▼

    Any height and width will do, with no padding: a map of stride s has ceil(H/s) × ceil(W/s) pixels.

    Args:
        arch: 'm1', 'm2', 'm3' or 'm4' (paper, Table 2), or a dict with ``embed_dims``, ``depths`` and ``state_dims``:
            channels, blocks and hidden states of each stage, finest first.
        in_channels: Channels of the image.
        out_indices: Stages whose maps are returned, ascending. Stages after the last of them are not built.
        out_hidden_states: Whether the hidden states of each stage's last block are returned too, before the maps: what
            ``mmevm.FusionClsHead`` fuses. Without it none of them outlives its block.
        mlp_ratio: Hidden channels of the FFNs, relative to the stage's channels.
        drop_path_rate: Stochastic depth of the last block; that of the others rises to it linearly from 0.
        norm_cfg: mmcv's config of all norms but those before the mixers, such as ``dict(type='SyncBN')``.
        mixer_cfg: Type of the token mixers, and its arguments but for ``channels`` and ``state_dim``; None is
            ``dict(type='mmevm.HSMSSD')``, the paper's.
        mixer_norm_cfg: mmcv's config of the norms before the mixers; None is ``dict(type='mmevm.LayerNorm2d')``.
        frozen_stages: −1 freezes nothing, 0 the stem, n the stem and the first n stages with their down-sampling: no
            gradient, and BatchNorm in eval mode even after ``train()``.
        norm_eval: Whether BatchNorm stays in eval mode after ``train()``; its weights and biases are trained all the
            same.
        with_cp: Whether blocks recompute their activations in the backward pass of training, which saves memory and
            costs time. ``torch.compile`` does not compile such blocks in training.
        deploy: Whether to build the deploy form, for weights that were saved after :meth:`switch_to_deploy`.
        init_cfg: mmengine's initialisation config. With ``type='Pretrained'`` every tensor of the backbone must be in
            the checkpoint, which may be a ``timm://`` name, a file of the authors', of timm's or of mmevm's own.

    Attributes:
        out_channels: Channels of each returned tensor.
        out_strides: Stride of each returned map, in pixels of the image.

    Raises:
        ValueError: If an argument has a value that is not allowed; the message says which are.

    Example:
        >>> import torch
        >>> from mmevm.models import EfficientViM
        >>> model = EfficientViM('m1').eval()
        >>> for feature in model(torch.rand(1, 3, 224, 160)):
        ...     print(tuple(feature.shape))
        (1, 128, 14, 10)
        (1, 192, 7, 5)
        (1, 320, 4, 3)
        >>> model.out_channels, model.out_strides
        ((128, 192, 320), (16, 32, 64))
        >>> model = EfficientViM('m1', out_indices=(2,), out_hidden_states=True).eval()
        >>> [tuple(out.shape) for out in model(torch.rand(1, 3, 224, 160))]
        [(1, 128, 49), (1, 192, 25), (1, 320, 9), (1, 320, 4, 3)]
    """

    arch_settings = {
        'm1': dict(embed_dims=(128, 192, 320), depths=(2, 2, 2), state_dims=(49, 25, 9)),
        'm2': dict(embed_dims=(128, 256, 512), depths=(2, 2, 2), state_dims=(49, 25, 9)),
        'm3': dict(embed_dims=(224, 320, 512), depths=(2, 2, 2), state_dims=(49, 25, 9)),
        'm4': dict(embed_dims=(224, 320, 512), depths=(3, 4, 2), state_dims=(64, 32, 16)),
    }

    def __init__(
        self,
        arch: str | dict = 'm4',
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2),
        out_hidden_states: bool = False,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        norm_cfg: dict | None = None,
        mixer_cfg: dict | None = None,
        mixer_norm_cfg: dict | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        deploy: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        settings = self._parse_arch(arch)
        embed_dims, depths, state_dims = (settings[key] for key in ('embed_dims', 'depths', 'state_dims'))
        self._check(out_indices, mlp_ratio, drop_path_rate, frozen_stages, in_channels, len(depths))
        block_cfgs = dict(
            norm_cfg=norm_cfg or dict(type='BN'),
            mixer_cfg=mixer_cfg or dict(type='mmevm.HSMSSD'),
            mixer_norm_cfg=mixer_norm_cfg or dict(type='mmevm.LayerNorm2d'),
        )
        norm_cfg = block_cfgs['norm_cfg']
        last = out_indices[-1]

        self.out_indices = tuple(out_indices)
        self.out_hidden_states = out_hidden_states
        self.out_channels = tuple(embed_dims[i] for i in self.out_indices)
        if out_hidden_states:
            self.out_channels = (*embed_dims[: last + 1], *self.out_channels)
        self.out_strides = tuple(16 * 2**i for i in self.out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

        self.patch_embed: Stem | DeployedStem = Stem(in_channels, embed_dims[0], norm_cfg)
        drop_paths = iter(torch.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.stages = nn.ModuleList(
            Stage(
                blocks=[
                    Block(embed_dims[i], state_dims[i], mlp_ratio, next(drop_paths), **block_cfgs)
                    for _ in range(depths[i])
                ],
                downsample=PatchMerging(embed_dims[i], embed_dims[i + 1], norm_cfg) if i < last else None,
                with_cp=with_cp,
            )
            for i in range(last + 1)
        )
        self._freeze()
        self.deploy = False
        if deploy:
            self.switch_to_deploy()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Extract features.

        Args:
            x: Images, (B, in_channels, H, W).

        Returns:
            With ``out_hidden_states``, first the hidden states (B, C, N) of each stage. Then a map (B, C, ceil(H/s),
            ceil(W/s)) for each of ``out_indices``. C is of ``out_channels``, s of ``out_strides``.

        Raises:
            ValueError: If ``x`` is not such a batch, or the hidden states are wanted of a mixer that has none.
        """
        if not torch.jit.is_tracing() and not is_compiling():
            self._check_images(x)
        x = _joined([self.patch_embed(part) for part in self._parts(x, stride=16)])
        hidden_states, maps = [], []
        for i, stage in enumerate(items(self.stages, Stage)):
            x, h = self._run(stage, x)
            if self.out_hidden_states:
                if h is None:
                    mixer = type(stage.blocks[-1].mixer).__name__
                    raise ValueError(f'{mixer} has no hidden states: set out_hidden_states=False of the backbone.')
                hidden_states.append(h)
            if i in self.out_indices:
                maps.append(x)
            if stage.downsample is not None:
                x = _joined([stage.downsample(part) for part in self._parts(x)])
        return (*hidden_states, *maps)

    def _run(self, stage: Stage, x: Tensor) -> tuple[Tensor, Tensor | None]:
        parts = [stage(part) for part in self._parts(x)]
        states = [h for _, h in parts if h is not None]
        return _joined([y for y, _ in parts]), _joined(states) if states else None

    def _parts(self, x: Tensor, stride: int = 1) -> Sequence[Tensor]:
        """A batch of which the next maps have this stride: in the deploy form on a CPU, a few images at a time."""
        if self.deploy and x.device.type == 'cpu' and not torch.jit.is_tracing() and not is_compiling():
            # So few that what lies between two layers stays in the cache.
            images = max(_POSITIONS_AT_ONCE * stride**2 // (x.shape[2] * x.shape[3]), 1)
            if len(x) > images:
                return x.chunk(math.ceil(len(x) / images))
        return [x]

    def _check_images(self, x: Tensor) -> None:
        weight = next(self.patch_embed.parameters())  # of the first convolution
        wanted = f'EfficientViM takes a tensor of images (B, {weight.shape[1]}, H, W)'
        if not isinstance(x, Tensor):
            raise ValueError(f'{wanted}, not a {type(x).__name__}: torch.stack joins images of one size.')
        if x.ndim != 4 or x.shape[1] != weight.shape[1] or 0 in x.shape[2:]:
            raise ValueError(f'{wanted} with at least one pixel, not {tuple(x.shape)}.')
        # Autocast converts what it is given, but integers.
        if not x.is_floating_point() or (x.dtype != weight.dtype and not is_autocast_enabled(x.device.type)):
            raise ValueError(
                f'{wanted} of {weight.dtype} as its weights are, not of {x.dtype}: convert them by '
                f'x.to({weight.dtype}), and normalise them as in training.'
            )

    def init_weights(self) -> None:
        """Initialise as ``init_cfg`` says.

        Raises:
            RuntimeError: If a checkpoint named by ``init_cfg`` does not hold every tensor of the backbone. mmengine's
                own loading would only warn, and train from random weights.
        """
        if pretrained_cfgs(self.init_cfg):
            init_from_checkpoints(self, prefix='backbone')
        else:
            super().init_weights()

    @torch.no_grad()
    @torch.inference_mode(mode=False)  # inference tensors could not be changed in place, or trained on, later
    def switch_to_deploy(self) -> None:
        """Take the form for inference, in place: the same maps with fewer and faster steps (``mmevm.models.deployed``).

        Weights are multiplied together, so it cannot be trained any more, and its checkpoints are for ``deploy=True``.
        Each layer keeps its dtype and device. A second call does nothing.

        Raises:
            TypeError: If a part, such as a down-sampling layer, was replaced by one of another type.
            ValueError: If a norm of ``norm_cfg`` is no BatchNorm, or a convolution is not a plain one, but has hooks or
                a parametrization such as spectral norm.
        """
        if isinstance(self.patch_embed, DeployedStem):
            return
        for stage in items(self.stages, Stage):
            for block in stage.blocks:
                check_type(block, Block)
        patch_embed = DeployedStem(self.patch_embed)
        stages = [
            (
                stage,
                [
                    DeployedBlock(block, self.out_hidden_states and block is stage.blocks[-1])
                    for block in items(stage.blocks, Block)
                ],
                None if stage.downsample is None else DeployedPatchMerging(stage.downsample),
            )
            for stage in items(self.stages, Stage)
        ]
        self.patch_embed = patch_embed
        for stage, blocks, downsample in stages:
            stage.blocks, stage.downsample = nn.ModuleList(blocks), downsample
        self.eval().requires_grad_(False)
        self.deploy = True

    def train(self, mode: bool = True) -> 'EfficientViM':
        """Set training mode, but for what ``frozen_stages`` and ``norm_eval`` keep in eval mode.

        Raises:
            RuntimeError: If the backbone has the deploy form.
        """
        if mode and self.deploy:
            raise RuntimeError('An EfficientViM in its deploy form cannot be trained: build it with deploy=False.')
        super().train(mode)
        if mode:
            self._freeze()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def _freeze(self) -> None:
        frozen = [self.patch_embed, *self.stages[: self.frozen_stages]] if self.frozen_stages >= 0 else []
        for module in frozen:
            module.eval()
            module.requires_grad_(False)

    @classmethod
    def _parse_arch(cls, arch: str | dict) -> dict:
        if not isinstance(arch, dict):
            if arch not in cls.arch_settings:
                raise ValueError(f'arch={arch!r} is unknown: choose from {list(cls.arch_settings)} or give a dict.')
            return cls.arch_settings[arch]
        keys = {'embed_dims', 'depths', 'state_dims'}
        if set(arch) != keys:
            raise ValueError(f'A custom arch has exactly the keys {sorted(keys)}, not {sorted(arch)}.')
        if len({len(arch[key]) for key in keys}) != 1 or not arch['depths']:
            raise ValueError(f'embed_dims, depths and state_dims need one entry for each stage: {arch}.')
        if any(value < 1 or value != int(value) for key in keys for value in arch[key]) or arch['embed_dims'][0] % 8:
            raise ValueError(
                f'An arch has positive integers, embed_dims[0] being a multiple of 8 for the stem: {arch}.'
            )
        return arch

    @staticmethod
    def _check(
        out_indices: Sequence[int],
        mlp_ratio: float,
        drop_path_rate: float,
        frozen_stages: int,
        in_channels: int,
        num_stages: int,
    ) -> None:
        if isinstance(out_indices, int):
            raise ValueError(f'out_indices={out_indices}: give a tuple or list, such as ({out_indices},).')
        allowed = range(num_stages)
        indices = list(out_indices)
        if not indices or indices != sorted(set(indices)) or not set(indices) <= set(allowed):
            raise ValueError(f'out_indices={out_indices}: give one or more of {list(allowed)}, each once, ascending.')
        if not -1 <= frozen_stages <= num_stages:
            raise ValueError(f'frozen_stages={frozen_stages}: −1 (nothing), 0 (the stem) to {num_stages} (all stages).')
        if frozen_stages > indices[-1] + 1:
            raise ValueError(
                f'frozen_stages={frozen_stages}, but out_indices={out_indices} builds {indices[-1] + 1} only.'
            )
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate={drop_path_rate}: a probability from 0 to below 1.')
        if mlp_ratio <= 0:
            raise ValueError(f'mlp_ratio={mlp_ratio} must be greater than 0.')
        if in_channels < 1:
            raise ValueError(f'in_channels={in_channels}: at least 1.')
