"""What is timed: from a name to a model with random weights. Nothing is downloaded."""

import difflib
from dataclasses import dataclass
from typing import Any

import timm
import torch
from mmengine.config import Config
from timm.utils import reparameterize_model
from torch import Tensor, nn

from mmevm.analysis.complexity import build_without_weights
from mmevm.cli import read_config
from mmevm.deployment import deploy
from mmevm.errors import ConfigError
from mmevm.models import EfficientViM
from mmevm.tensors import DETECTORS, TensorFunction

PARTS = ('backbone', 'model')

# Ours, the authors' as timm has it, and of the peers in the paper's Table B those that have maintained code.
DEFAULT_MODELS = (
    *('m4', 'efficientvim_m4', 'shvit_s4', 'efficientnet_b0', 'poolformer_s12', 'fastvit_sa12', 'pvt_v2_b0'),
)


AS_TRAINED = '@trained'


@dataclass(frozen=True)
class ModelSpec:
    """A model by its name.

    Args:
        name: 'm1' to 'm4' for mmevm's backbones; a name of timm's, whose feature maps are taken; or a config of mmevm,
            MMDetection or MMPretrain, as a path or within a package (``mmdet::…``). With '@trained' after it, the model
            keeps the form in which it is trained, beside others that are deployed.
        part: What is taken of a config's model, 'backbone' or the whole 'model': a classifier with its head, a detector
            up to what its heads put out, without post-processing. Names of timm's and of mmevm's are backbones.
        with_cp: Whether the blocks of mmevm's backbones recompute their activations in the backward pass; other
            backbones do not know it.

    Raises:
        ValueError: If there is no model of that name, or no such part.
        ConfigError: If the config cannot be read, or has no such part.

    Example:
        >>> from mmevm.analysis.latency import ModelSpec
        >>> subject = ModelSpec('efficientvim_m1')
        >>> model = subject.deploy(subject.build())
        >>> [tuple(feature.shape) for feature in model(torch.rand(1, 3, 64, 64))]
        [(1, 128, 4, 4), (1, 192, 2, 2), (1, 320, 1, 1)]
    """

    name: str
    part: str = 'backbone'
    with_cp: bool = False

    def __post_init__(self) -> None:
        if self.part not in PARTS:
            raise ValueError(f'part={self.part!r} is none of {", ".join(PARTS)}.')
        if self.is_config:
            self._config()
        elif not self.is_ours and not timm.is_model(self.base):
            raise ValueError(
                f'{self.base} is neither one of mmevm ({", ".join(EfficientViM.arch_settings)}) nor of timm '
                f'{timm.__version__}{_suggestion(self.base)}. A config is named by a path that ends with .py, or by '
                'something like mmdet::retinanet/retinanet_r50_fpn_1x_coco.py.'
            )

    @property
    def base(self) -> str:
        """The name without the form."""
        return self.name.removesuffix(AS_TRAINED)

    @property
    def is_config(self) -> bool:
        """Whether the name is one of a config."""
        return '::' in self.base or self.base.endswith('.py')

    @property
    def is_ours(self) -> bool:
        """Whether the name is one of mmevm's backbones."""
        return self.base in EfficientViM.arch_settings

    @property
    def recomputes(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return self.with_cp and (self.is_ours or (self.is_config and _has_our_backbone(self._config())))

    def build(self) -> nn.Module:
        """Build the model, in eval mode, with random weights: the same in each call.

        Raises:
            ConfigError: If the config's model has no such part.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module
            if self.is_ours:
                model = EfficientViM(self.base, with_cp=self.recomputes)
            elif self.is_config:
                model = self._build_config()
            else:
                model = _build_timm(self.base)
        model.eval()  # some of MMDetection's return nothing
        return model

    def deploy(self, model: nn.Module) -> nn.Module:
        """Give the model that :meth:`build` has made its form for inference; timm's models have timm's own."""
        if self.name != self.base:
            return model
        if not (self.is_ours or self.is_config):
            return reparameterize_model(model).eval()
        return deploy(model)

    def _config(self) -> Config:
        cfg = read_config(self.base)
        if 'model' not in cfg:
            raise ConfigError(f'{self.base} has no `model`, so there is nothing to measure.')
        if self.part == 'backbone' and 'backbone' not in cfg.model:
            raise ConfigError(f'{self.base}: its {cfg.model.type} has no backbone; take the whole with part model.')
        return cfg

    def _build_config(self) -> nn.Module:
        cfg = self._config()
        if self.recomputes:
            cfg.model.backbone.with_cp = True
        model = build_without_weights(cfg)
        if self.part == 'backbone':
            return model.get_submodule('backbone')
        # A two-stage detector asks for the sizes of the images.
        return TensorFunction(model) if isinstance(model, DETECTORS) else model


class _LastMap(nn.Module):
    """A model of timm's that offers no feature maps of its stages, up to its head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model  # what else than a module timm's have in common has no type

    def forward(self, x: Tensor) -> Tensor:
        return self.model.forward_features(x)


def _build_timm(name: str) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=False, features_only=True)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):  # how differs among the models
        return _LastMap(timm.create_model(name, pretrained=False, num_classes=0))


def _has_our_backbone(cfg: Config) -> bool:
    backbone = cfg.model.get('backbone') or {}
    return getattr(backbone.get('type'), '__name__', backbone.get('type')) in ('EfficientViM', 'mmevm.EfficientViM')


def _suggestion(name: str) -> str:
    known = [*EfficientViM.arch_settings, *timm.list_models()]
    close = timm.list_models(f'{name}*')[:4] or difflib.get_close_matches(name, known, n=10)
    return f'; close to it are {", ".join(close)}' if close else ''
