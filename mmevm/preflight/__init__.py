"""Mistakes of a config, found before anything is built: what else would end a run hours later, or train on nothing."""

from collections.abc import Sequence

from mmengine.config import Config

from .annotations import check_annotations
from .arguments import check_arguments
from .data import check_data
from .errors import ConfigError
from .model import check_model

__all__ = ['ConfigError', 'check_annotations', 'check_config']


def check_config(cfg: Config, splits: Sequence[str]) -> None:
    """Make sure that the data is there, that types and arguments exist, and that the parts of the model fit each other.

    Args:
        cfg: A config for mmengine's runner.
        splits: Those of 'train', 'val' and 'test' that are about to be used.

    Raises:
        ConfigError: At the first mistake; the message names the key and what to do.
    """
    check_data(cfg, splits)
    check_arguments(cfg, splits)
    check_model(cfg)
