"""Initialize a backbone or a head from the checkpoints that its ``init_cfg`` names, strictly."""

from typing import Any

from mmengine.model import BaseModule, PretrainedInit

from mmevm.registry import WEIGHT_INITIALIZERS


def pretrained_cfgs(init_cfg: dict | list[dict] | None) -> list[dict]:
    """Return the entries of an ``init_cfg`` that name a checkpoint, without their type."""
    cfgs = init_cfg if isinstance(init_cfg, list) else [init_cfg]
    types = ('Pretrained', 'mmengine.Pretrained', PretrainedInit)
    return [{key: cfg[key] for key in cfg if key != 'type'} for cfg in cfgs if cfg and cfg['type'] in types]


def init_from_checkpoints(module: BaseModule, **defaults: Any) -> None:
    """Load the checkpoints of ``module.init_cfg``. Each must contain every tensor of the module.

    mmengine's ``PretrainedInit`` only warns about missing tensors.

    Args:
        module: The module that gets the weights.
        **defaults: Arguments of ``mmevm.StrictPretrainedInit`` that ``init_cfg`` may override.

    Raises:
        CheckpointError: If a checkpoint cannot be read, or does not contain every tensor of the module.
    """
    for cfg in pretrained_cfgs(module.init_cfg):
        WEIGHT_INITIALIZERS.build({**defaults, **cfg, 'type': 'mmevm.StrictPretrainedInit'})(module)
    module._is_init = True
