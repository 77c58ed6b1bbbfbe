"""Build the models to time, with random weights, from their names. Nothing is downloaded."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from mmengine.config import Config
from timm.utils import reparameterize_model
from torch import nn

from mmevm.analysis.build import build_without_weights
from mmevm.cli import read_config
from mmevm.deployment import deploy
from mmevm.errors import ConfigError, EngineError
from mmevm.models import EfficientViM
from mmevm.tensors import DETECTORS, TensorFunction

PARTS = ('backbone', 'model', 'detector')

# mmevm's M4, timm's port of it, and the peers of the paper's Table B that have maintained code.
DEFAULT_MODELS = (
    *('m4', 'efficientvim_m4', 'shvit_s4', 'efficientnet_b0', 'poolformer_s12', 'fastvit_sa12', 'pvt_v2_b0'),
)


@dataclass(frozen=True)
class ModelSpec:
    """A model to time.

    Args:
        name: 'm1' to 'm4' for mmevm's backbones; a timm model, of which the feature maps are used; or a config of
            mmevm, MMDetection or MMPretrain, as a path or in a package (``mmdet::…``); or an ONNX file, which ONNX
            Runtime and OpenVINO run. The suffix '@trained' excludes the model from deploy mode.
        part: Part of a config's model: 'backbone'; the whole 'model', which is a classifier with its head, or a
            detector up to the outputs of its heads, without post-processing; or a whole 'detector' from an image in
            memory to its objects.

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
        if self.file is not None:
            if not self.file.is_file():
                raise ValueError(f'{self.name}: there is no such file ({self.file.resolve()}).')
        elif self._is_config:
            self._read_config()
        elif self.part == 'detector':
            raise ValueError(f'{self.name} is no detector: with part=detector, expected configs of detectors.')
        elif self._base not in EfficientViM.arch_settings and not timm.is_model(self._base):
            known = [*EfficientViM.arch_settings, *timm.list_models()]
            similar = ', '.join(difflib.get_close_matches(self._base.lower(), known, n=10))
            raise ValueError(
                f'{self._base} is not a model of mmevm or timm {timm.__version__} (similar names: {similar}). '
                'For a config, pass a path that ends with .py, or a name such as mmdet::….'
            )

    @property
    def file(self) -> Path | None:
        """The ONNX file that is the model; None if it is built in PyTorch."""
        return Path(self.name) if self.name.endswith('.onnx') else None

    @property
    def _base(self) -> str:
        return self.name.removesuffix('@trained')

    @property
    def _is_config(self) -> bool:
        return '::' in self._base or self._base.endswith('.py')

    def build(self) -> nn.Module:
        """Build the model in eval mode, with the same random weights in each call.

        Raises:
            EngineError: If it is an ONNX file.
        """
        if self.file is not None:
            raise EngineError(f'{self.name} is an ONNX file, which only onnxruntime and openvino run.')
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self._build()
        model.eval()  # a separate statement, as some models of MMDetection return None
        return model

    def deploy(self, model: nn.Module) -> nn.Module:
        """Switch a model of :meth:`build` to deploy mode; timm's are reparameterized by timm."""
        if self.name != self._base:
            return model
        if self._is_config or self._base in EfficientViM.arch_settings:
            return deploy(model)
        return reparameterize_model(model).eval()

    def _build(self) -> nn.Module:
        if self._base in EfficientViM.arch_settings:
            return EfficientViM(self._base)
        if not self._is_config:
            try:
                return timm.create_model(self._base, features_only=True)
            except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):  # no feature maps
                peer: Any = timm.create_model(self._base, num_classes=0)
                peer.forward = peer.forward_features  # without the head
                return peer
        model = build_without_weights(self._read_config())
        if self.part == 'backbone':
            return model.get_submodule('backbone')
        return TensorFunction(model) if isinstance(model, DETECTORS) and self.part == 'model' else model

    def _read_config(self) -> Config:
        cfg = read_config(self._base)
        if 'model' not in cfg:
            raise ConfigError(f'{self._base} has no `model`, so there is nothing to measure. Pass a complete config.')
        if self.part == 'backbone' and 'backbone' not in cfg.model:
            raise ConfigError(f'{self._base}: {cfg.model.type} has no backbone. Use --part model for the whole model.')
        if self.part == 'detector' and cfg.get('default_scope') != 'mmdet':
            raise ConfigError(
                f'{self._base}: default_scope={cfg.get("default_scope")!r}, but --part detector is for detectors '
                '(mmdet). Use --part model.'
            )
        return cfg
