"""EfficientViM: Efficient Vision Mamba with Hidden State Mixer based State Space Duality (CVPR 2025).

Paper: https://arxiv.org/abs/2411.15241. Where the paper and the authors' code differ, this follows the code, from which
their numbers and weights came.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmevm.compat import is_autocast_enabled, is_compiling
from mmevm.registry import MODELS

from .fuse import check_type, fuse_gated_residual, make_conv, scale_outputs
from .layers import (
    FFN,
    ConvNorm,
    DeployPatchMerging,
    DeployStem,
    PatchMerging,
    Stem,
    cast_modules,
    fold_conv_norm,
)
from .mixers import make_deploy_mixer
from .recompute import recompute
from .weight_init import init_from_checkpoints, pretrained_cfgs

# Tokens (pixels of a map) per call of a stage in deploy mode on a CPU: see docs/dev/benchmarks.md.
_MAX_TOKENS = 4 * 32**2
# Of the maps of the stem's convolutions except the last, whose map is the input of the first stage.
_STEM_STRIDES = (2, 4, 8)


class Block(nn.Module):
    """Depthwise convolution, HSM-SSD, depthwise convolution, FFN, each with a convex gate (paper, Sec. 3.3, Fig. 4).

    ``x ← (1 − g)·x + g·f(x)`` with ``g = sigmoid(alpha)`` per channel. The paper calls it layer scale, but it scales
    the shortcut too and starts near one half.

    Args:
        channels: C, of input and output.
        state_dim: Number of hidden states of the mixer.
        mlp_ratio: Hidden channels of the FFN, relative to C.
        drop_path: Probability with which a sample skips one of the four steps in training.
        norm_cfg: mmcv's config of all norms except that before the mixer.
        mixer_cfg: Type of the mixer, and its arguments except ``channels`` and ``state_dim``.
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
        # Dropping a path closes its gate; DropPath also scales the gates that stay open, to keep the expectation.
        gate = self.drop_path(gate.expand(x.shape[0], -1, -1, -1))
        return torch.lerp(x, fx.to(x.dtype), gate.to(x.dtype))


class DeployBlock(nn.Module):
    """``Block`` with its BatchNorms and gates folded into the convolutions.

    With the gates g₀…g₃ and the steps dw₁, mix, dw₂ and ffn, the block is::

        x ← (1−g₀)·x + g₀·dw₁(x)       one depthwise convolution
        x ← (1−g₁)·x + g₁·mix(x)       = (1−g₁)·(x + g₁/(1−g₁)·mix(x)); the factor in front goes into dw₂'s kernel
        x ← (1−g₂)·x + g₂·dw₂(x)       one depthwise convolution, which also multiplies by (1−g₃), so that
        x ← (1−g₃)·x + g₃·ffn(x)       has a plain shortcut

    Args:
        block: The trained block, with any mixer.
        out_hidden_states: Whether to return the mixer's hidden states.
    """

    def __init__(self, block: Block, out_hidden_states: bool) -> None:
        super().__init__()
        gates = block.alpha.detach().double().sigmoid()
        shortcuts = (-block.alpha.detach().double()).sigmoid()  # 1 − g, without cancellation
        self.out_hidden_states = out_hidden_states

        weight, bias = fuse_gated_residual(*fold_conv_norm(block.dwconv1), gates[0], shortcuts[0])
        self.dwconv1 = make_conv(weight, bias, like=block.dwconv1.conv)
        self.mixer = make_deploy_mixer(
            block.norm, block.mixer, ratio=gates[1] / shortcuts[1], like=block.dwconv1.conv.weight
        )
        weight, bias = fuse_gated_residual(*fold_conv_norm(block.dwconv2), gates[2], shortcuts[2])
        weight, bias = scale_outputs(weight, shortcuts[1] * shortcuts[3]), bias * shortcuts[3]
        self.dwconv2 = make_conv(weight, bias, like=block.dwconv2.conv)

        ffn = check_type(block.ffn, FFN)
        weight, bias = fold_conv_norm(ffn.fc1, relu=True)
        self.fc1 = make_conv(weight / shortcuts[3].view(-1, 1, 1), bias, like=ffn.fc1.conv)
        weight, bias = fold_conv_norm(ffn.fc2)
        self.fc2 = make_conv(scale_outputs(weight, gates[3]), bias * gates[3], like=ffn.fc2.conv)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, C, H, W) to the same, and the hidden states (B, C, N) if requested."""
        x, h = self.mixer(self.dwconv1(x), self.out_hidden_states)
        x = self.dwconv2(x)
        return self.fc2(F.relu_(self.fc1(x))).add_(x), h


class Stage(nn.Module):
    """Blocks at one resolution, and the downsampling to the next stage.

    ``forward`` leaves the downsampling to the backbone, which returns the map before it.

    Args:
        blocks: The blocks, in order.
        downsample: The downsampling to the next stage; None in the last one.
        with_cp: Whether blocks recompute their activations in the backward pass of training instead of keeping them.
    """

    def __init__(self, blocks: Sequence[Block], downsample: PatchMerging | None, with_cp: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample: PatchMerging | DeployPatchMerging | None = downsample
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the blocks.

        Args:
            x: (B, C, H, W).

        Returns:
            The map of the last block, (B, C, H, W), and its hidden states, (B, C, N); None if its mixer has none.
        """
        for block in self.blocks:
            if self.with_cp and self.training and torch.is_grad_enabled():
                x, h = recompute(block, x)
            else:
                x, h = block(x)
        return x, h


@MODELS.register_module()
class EfficientViM(BaseModule):
    """EfficientViM as a multi-scale backbone.

    ::

        image ─ patch_embed ─ stages[0] ┬ downsample ─ stages[1] ┬ downsample ─ stages[2] ┐
        (4 convs of stride 2)           │                        │                        │
        stride 2, 4, 8 ▼      stride 16 ▼              stride 32 ▼              stride 64 ▼

    Any height and width work, without padding: a map of stride s has ceil(H/s) × ceil(W/s) pixels.

    Args:
        arch: 'm1', 'm2', 'm3' or 'm4' (paper, Table 2), or a dict with ``embed_dims``, ``depths`` and ``state_dims``:
            channels, blocks and hidden states of each stage, finest first.
        in_channels: Channels of the image.
        out_indices: Stages whose maps are returned, ascending; None is (0, 1, 2). Stages after the last of them are
            not built.
        out_strides: Strides of the maps that are returned, ascending, instead of ``out_indices``: 16, 32, 64 for the
            stages, at least one of them, and 2, 4, 8 for the first three convolutions of the stem, after ReLU. Their
            maps have ``embed_dims[0]·stride/16`` channels.
        out_hidden_states: Whether to return also the hidden states of each stage's last block, before the maps:
            ``mmevm.FusionClsHead`` fuses them.
        mlp_ratio: Hidden channels of the FFNs, relative to the stage's channels.
        drop_path_rate: Stochastic depth of the last block; that of the others rises to it linearly from 0.
        norm_cfg: mmcv's config of all norms except those before the mixers, such as ``dict(type='SyncBN')``.
        mixer_cfg: Type of the token mixers, and its arguments except ``channels`` and ``state_dim``; None is
            ``dict(type='mmevm.HSMSSD')``.
        mixer_norm_cfg: mmcv's config of the norms before the mixers; None is ``dict(type='mmevm.LayerNorm2d')``.
        frozen_stages: −1 freezes nothing, 0 the stem, n the stem and the first n stages with their downsampling: no
            gradient, and BatchNorm in eval mode even after ``train()``.
        norm_eval: Whether BatchNorm stays in eval mode after ``train()``. Its weights and biases are still trained.
        with_cp: Whether blocks recompute their activations in the backward pass of training, which saves memory and
            takes time. ``torch.compile`` does not compile such blocks in training.
        deploy: Whether to build the backbone in deploy mode, for weights saved after :meth:`switch_to_deploy`.
        init_cfg: mmengine's initialization config. With ``type='Pretrained'`` the checkpoint must contain every tensor
            of the backbone. It may be a ``timm://`` name, or a file of the authors, of timm or of mmevm.
        channels_last: Whether to convert images to channels_last. The returned maps then have this format too. None
            converts them on a CPU, where it makes training faster. Deploy mode always converts them.

    Attributes:
        out_channels: Channels of each returned tensor.
        out_strides: Stride of each returned map, in pixels of the image.

    Raises:
        ValueError: If an argument has a value that is not allowed; the message lists the allowed ones.

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
        >>> model = EfficientViM('m1', out_strides=(4, 8, 16, 32))
        >>> model.out_channels
        (32, 64, 128, 192)
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
        out_indices: Sequence[int] | None = None,
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
        out_strides: Sequence[int] | None = None,
        channels_last: bool | None = None,
    ) -> None:
        super().__init__(init_cfg)
        settings = self._parse_arch(arch)
        embed_dims, depths, state_dims = (settings[key] for key in ('embed_dims', 'depths', 'state_dims'))
        self._check_arguments(mlp_ratio, drop_path_rate, in_channels)
        strides = [16 * 2**i for i in range(len(depths))]
        self.out_strides = self._parse_outputs(out_indices, out_strides, strides)
        self.out_indices = tuple(i for i, stride in enumerate(strides) if stride in self.out_strides)
        last = self.out_indices[-1]
        if not -1 <= frozen_stages <= last + 1:
            outputs = f'out_indices={self.out_indices}' if out_strides is None else f'out_strides={self.out_strides}'
            raise ValueError(
                f'frozen_stages={frozen_stages}: expected −1 (nothing), 0 (the stem) to {last + 1} (all stages that '
                f'{outputs} builds).'
            )
        block_cfgs = dict(
            norm_cfg=norm_cfg or dict(type='BN'),
            mixer_cfg=mixer_cfg or dict(type='mmevm.HSMSSD'),
            mixer_norm_cfg=mixer_norm_cfg or dict(type='mmevm.LayerNorm2d'),
        )
        norm_cfg = block_cfgs['norm_cfg']

        self.out_hidden_states = out_hidden_states
        channels = {stride: embed_dims[0] * stride // 16 for stride in _STEM_STRIDES}
        channels.update(zip(strides, embed_dims, strict=True))
        self.out_channels = tuple(channels[stride] for stride in self.out_strides)
        if out_hidden_states:
            self.out_channels = (*embed_dims[: last + 1], *self.out_channels)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.channels_last = channels_last

        stem_indices = [i for i, stride in enumerate(_STEM_STRIDES) if stride in self.out_strides]
        self.patch_embed: Stem | DeployStem = Stem(in_channels, embed_dims[0], norm_cfg, stem_indices)
        drop_paths = iter(torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist())
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
            ceil(W/s)) for each of ``out_strides``. C is of ``out_channels``, s of ``out_strides``.

        Raises:
            ValueError: If ``x`` is not such a batch, or ``out_hidden_states`` is set and the mixer has none.
        """
        if not torch.jit.is_tracing() and not is_compiling():
            self._check_images(x)
        if self.channels_last or (self.channels_last is None and x.device.type == 'cpu'):
            x = x.contiguous(memory_format=torch.channels_last)
        x = self._call(self.patch_embed, x, stride=16)
        hidden_states, maps = [], []
        if self.out_strides[0] in _STEM_STRIDES:
            *maps, x = x
        for i, stage in enumerate(cast_modules(self.stages, Stage)):
            x, h = self._call(stage, x)
            if self.out_hidden_states:
                if h is None:
                    mixer = type(stage.blocks[-1].mixer).__name__
                    raise ValueError(f'{mixer} has no hidden states: set out_hidden_states=False of the backbone.')
                hidden_states.append(h)
            if i in self.out_indices:
                maps.append(x)
            if stage.downsample is not None:
                x = self._call(stage.downsample, x)
        return (*hidden_states, *maps)

    def _call(self, module: Callable[[Tensor], Any], x: Tensor, stride: int = 1) -> Any:
        """Call a module; in deploy mode on a CPU, with a few images at a time.

        Args:
            module: Returns a tensor (B, …), or a tuple of such tensors and None.
            x: (B, C, H, W).
            stride: Stride of the module's maps, relative to ``x``.
        """
        if self.deploy and x.device.type == 'cpu' and not torch.jit.is_tracing() and not is_compiling():
            # Few enough that the activations between two layers stay in the cache.
            images = max(_MAX_TOKENS * stride**2 // (x.shape[2] * x.shape[3]), 1)
            if len(x) > images:
                chunks = [module(chunk) for chunk in x.chunk(math.ceil(len(x) / images))]
                if isinstance(chunks[0], Tensor):
                    return torch.cat(chunks)
                return tuple(None if y[0] is None else torch.cat(y) for y in zip(*chunks, strict=True))
        return module(x)

    def _check_images(self, x: Tensor) -> None:
        weight = next(self.patch_embed.parameters())  # of the first convolution
        expected = f'EfficientViM takes a tensor of images (B, {weight.shape[1]}, H, W)'
        if not isinstance(x, Tensor):
            raise ValueError(f'{expected}, not a {type(x).__name__}: torch.stack joins images of one size.')
        if x.ndim != 4 or x.shape[1] != weight.shape[1] or 0 in x.shape[2:]:
            raise ValueError(f'{expected} with at least one pixel, not {tuple(x.shape)}.')
        # Autocast converts floats of other dtypes, but not integers.
        if not x.is_floating_point() or (x.dtype != weight.dtype and not is_autocast_enabled(x.device.type)):
            raise ValueError(
                f'{expected} of {weight.dtype} as its weights are, not of {x.dtype}: convert them by '
                f'x.to({weight.dtype}), and normalize them as in training.'
            )

    def init_weights(self) -> None:
        """Initialize as ``init_cfg`` says.

        Raises:
            CheckpointError: If a checkpoint in ``init_cfg`` does not contain every tensor of the backbone. mmengine's
                own loading would only warn.
        """
        if pretrained_cfgs(self.init_cfg):
            init_from_checkpoints(self, prefix='backbone')
        else:
            super().init_weights()

    @torch.no_grad()
    @torch.inference_mode(mode=False)  # inference tensors could not be changed in place, or trained on, later
    def switch_to_deploy(self) -> None:
        """Switch to deploy mode in place: the same outputs with fewer and faster operations.

        BatchNorm, gates and residual connections are folded into the convolutions, so the backbone cannot be trained
        any more, and its checkpoints are for ``deploy=True``. Each layer keeps its dtype and device. A second call does
        nothing.

        Raises:
            TypeError: If a layer, such as a downsampling layer, was replaced by one of another type.
            ValueError: If a norm of ``norm_cfg`` is not a BatchNorm, or a convolution is not a plain one but has hooks
                or a parametrization such as spectral norm.
        """
        if self.deploy:
            return
        # Build everything before changing anything: an error leaves the backbone as it was.
        patch_embed = DeployStem(self.patch_embed)
        stages = list(cast_modules(self.stages, Stage))
        blocks = [
            [
                DeployBlock(check_type(block, Block), self.out_hidden_states and block is stage.blocks[-1])
                for block in stage.blocks
            ]
            for stage in stages
        ]
        downsamples = [None if stage.downsample is None else DeployPatchMerging(stage.downsample) for stage in stages]
        self.patch_embed = patch_embed
        for i, stage in enumerate(stages):
            stage.blocks, stage.downsample = nn.ModuleList(blocks[i]), downsamples[i]
        self.eval().requires_grad_(False)
        self.deploy = True

    def train(self, mode: bool = True) -> 'EfficientViM':
        """Set training mode, except for what ``frozen_stages`` and ``norm_eval`` keep in eval mode.

        Raises:
            RuntimeError: If the backbone is in deploy mode.
        """
        if mode and self.deploy:
            raise RuntimeError('An EfficientViM in deploy mode cannot be trained: build it with deploy=False.')
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
            raise ValueError(f'arch={arch}: a dict needs exactly the keys {sorted(keys)}.')
        if len({len(arch[key]) for key in keys}) != 1 or not arch['depths']:
            raise ValueError(f'arch={arch}: embed_dims, depths and state_dims need one entry for each stage.')
        if any(value < 1 or value != int(value) for key in keys for value in arch[key]) or arch['embed_dims'][0] % 8:
            raise ValueError(f'arch={arch}: all values must be positive integers, embed_dims[0] a multiple of 8.')
        return arch

    @staticmethod
    def _parse_outputs(
        out_indices: Sequence[int] | None, out_strides: Sequence[int] | None, stage_strides: list[int]
    ) -> tuple[int, ...]:
        """Return the strides of the maps that one of the two arguments selects."""
        if out_indices is not None and out_strides is not None:
            raise ValueError(
                f'out_strides={out_strides}: out_indices={out_indices} selects maps, too. Give only one of the two. If '
                'a base config gives the other one, set that to None.'
            )
        if out_strides is None:
            indices = _parse_selection(
                'out_indices', (0, 1, 2) if out_indices is None else out_indices, range(len(stage_strides))
            )
            return tuple(stage_strides[i] for i in indices)
        strides = _parse_selection('out_strides', out_strides, (*_STEM_STRIDES, *stage_strides))
        if strides[-1] not in stage_strides:
            raise ValueError(
                f'out_strides={out_strides}: give at least one of {stage_strides}, the strides of the stages.'
            )
        return strides

    @staticmethod
    def _check_arguments(mlp_ratio: float, drop_path_rate: float, in_channels: int) -> None:
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate={drop_path_rate}: expected a probability, at least 0 and below 1.')
        if mlp_ratio <= 0:
            raise ValueError(f'mlp_ratio={mlp_ratio}: expected a number greater than 0.')
        if in_channels < 1:
            raise ValueError(f'in_channels={in_channels}: expected at least 1.')


def _parse_selection(name: str, selected: Sequence[int], allowed: Sequence[int]) -> tuple[int, ...]:
    """Check an argument that selects one or more of the allowed numbers, ascending."""
    if isinstance(selected, int):
        raise ValueError(f'{name}={selected}: give a tuple or list, such as ({selected},).')
    numbers = list(selected)
    if not numbers or numbers != sorted(set(numbers)) or not set(numbers) <= set(allowed):
        raise ValueError(f'{name}={selected}: give one or more of {list(allowed)}, each once, ascending.')
    return tuple(numbers)
