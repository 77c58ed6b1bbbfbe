"""Build the models to time, with random weights, from their names. Nothing is downloaded."""

import difflib
from dataclasses import dataclass
from typing import Any

import timm
import torch
from mmengine.config import Config
from timm.utils import reparameterize_model
from torch import Tensor, nn

from mmevm.analysis.build import build_without_weights
from mmevm.cli import read_config
from mmevm.deployment import deploy
from mmevm.errors import ConfigError
from mmevm.models import EfficientViM
from mmevm.tensors import DETECTORS, TensorFunction

PARTS = ('backbone', 'model')

# mmevm's M4, timm's port of it, and the peers of the paper's Table B that have maintained code.
DEFAULT_MODELS = (
    *('m4', 'efficientvim_m4', 'shvit_s4', 'efficientnet_b0', 'poolformer_s12', 'fastvit_sa12', 'pvt_v2_b0'),
)

# Suffix of a model that is not switched to deploy mode.
AS_TRAINED = '@trained'


@dataclass(frozen=True)
class ModelSpec:
    """A model to time.

    Args:
        name: 'm1' to 'm4' for mmevm's backbones; a timm model, of which the feature maps are used; or a config of
            mmevm, MMDetection or MMPretrain, as a path or in a package (``mmdet::…``). The suffix '@trained' excludes
            the model from deploy mode.
        part: Part of a config's model: 'backbone', or the whole 'model', which is a classifier with its head, or a
            detector up to the outputs of its heads, without post-processing.

    Raises:
        ValueError: If the name or the part is unknown.
        ConfigError: If the config cannot be read or lacks the part.

    Example:
        >>> from mmevm.analysis.latency import ModelSpec
        >>> spec = ModelSpec('efficientvim_m1')
        >>> model = spec.deploy(spec.build())
        >>> [tuple(feature.shape) for feature in model(torch.rand(1, 3, 64, 64))]
        [(1, 128, 4, 4), (1, 192, 2, 2), (1, 320, 1, 1)]
    """

    name: str
    part: str = 'backbone'

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f'part={self.part!r} is not one of {", ".join(PARTS)}.')
        if self.is_config:
            self._read_config()
        elif not self.is_ours and not timm.is_model(self.base):
            raise ValueError(
                f'{self.base} is not a model of mmevm ({", ".join(EfficientViM.arch_settings)}) or timm '
                f'{timm.__version__}{_suggest(self.base)}. For a config, pass a path that ends with .py, or a name '
                'such as mmdet::retinanet/retinanet_r50_fpn_1x_coco.py.'
            )

    @property
    def base(self) -> str:
        """The name without '@trained'."""
        return self.name.removesuffix(AS_TRAINED)

    @property
    def is_config(self) -> bool:
        """Whether the name is that of a config."""
        return '::' in self.base or self.base.endswith('.py')

    @property
    def is_ours(self) -> bool:
        """Whether the name is that of an mmevm backbone."""
        return self.base in EfficientViM.arch_settings

    def build(self) -> nn.Module:
        """Build the model in eval mode, with the same random weights in each call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module
            if self.is_ours:
                model = EfficientViM(self.base)
            elif self.is_config:
                model = self._build_from_config()
            else:
                model = _build_timm(self.base)
        model.eval()  # a separate statement, as some models of MMDetection return None
        return model

    def deploy(self, model: nn.Module) -> nn.Module:
        """Switch a model of :meth:`build` to deploy mode; timm's are reparameterized by timm."""
        if self.name != self.base:
            return model
        if not (self.is_ours or self.is_config):
            return reparameterize_model(model).eval()
        return deploy(model)

    def _read_config(self) -> Config:
        cfg = read_config(self.base)
        if 'model' not in cfg:
            raise ConfigError(f'{self.base} has no `model`, so there is nothing to measure. Pass a complete config.')
        if self.part == 'backbone' and 'backbone' not in cfg.model:
            raise ConfigError(f'{self.base}: {cfg.model.type} has no backbone. Use --part model for the whole model.')
        return cfg

    def _build_from_config(self) -> nn.Module:
        model = build_without_weights(self._read_config())
        if self.part == 'backbone':
            return model.get_submodule('backbone')
        return TensorFunction(model) if isinstance(model, DETECTORS) else model


class _LastFeatures(nn.Module):
    """A timm model without ``features_only`` support, up to its head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model  # timm's models have no common type with forward_features

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_features(x)


def _build_timm(name: str) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=False, features_only=True)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):  # differs between models
        return _LastFeatures(timm.create_model(name, pretrained=False, num_classes=0))


def _suggest(name: str) -> str:
    known = [*EfficientViM.arch_settings, *timm.list_models()]
    similar = timm.list_models(f'{name}*')[:4] or difflib.get_close_matches(name.lower(), known, n=10)
    return f' (similar names: {", ".join(similar)})' if similar else ''
