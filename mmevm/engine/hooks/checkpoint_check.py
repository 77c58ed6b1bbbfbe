"""Check a loaded checkpoint against the model."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from mmevm.checkpoints import check_partial, check_strict, strip_scheme, unwrap_model
from mmevm.checkpoints.state_dict import find_mismatches, state_shapes
from mmevm.registry import HOOKS


@HOOKS.register_module()
class CheckpointCheckHook(Hook):
    """Check that a checkpoint fits the model; mmengine only warns of differences.

    A checkpoint that a training is resumed from (``resume=True``) must have every tensor of the model. For one that a
    training starts from (``load_from``), the log tells how many tensors were loaded; none at all is an error. A warning
    names other parts of a training that were not saved.

    Args:
        strict: Whether ``load_from`` must have every tensor too, as for an evaluation.
    """

    priority = 'VERY_HIGH'  # before EMAHook swaps the averaged weights

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare the checkpoint with the model.

        Raises:
            CheckpointError: If the checkpoint does not fit.
        """
        name, model = strip_scheme(str(runner.cfg.get('load_from'))), unwrap_model(runner)
        resumes = runner.cfg.get('resume')
        if not (resumes or self.strict):
            check_partial(model, checkpoint, name)
            return
        check_strict(model, checkpoint, name)
        if self.strict and not _has_tensors_of(model, checkpoint.get('ema_state_dict')):
            del checkpoint[
                'ema_state_dict'
            ]  # as after MMPretrain's reparameterize_model.py, whose EMAHook would load it
            runner.logger.info(f'{name}: ema_state_dict does not match the model and is not used.')
        if not resumes:
            return
        if 'optimizer' not in checkpoint:
            runner.logger.warning(
                f'{name} was saved with save_optimizer=False: the optimizer restarts. The schedulers continue from its '
                'initial learning rate, or from that at the start of a warm-up, not from the one at the checkpoint: '
                'check lr in the log.'
            )
        if 'param_schedulers' not in checkpoint and runner.param_schedulers:
            runner.logger.warning(f'{name} was saved with save_param_scheduler=False: the schedulers restart.')


def _has_tensors_of(model: Any, averaged: Any) -> bool:
    """Return whether the ``ema_state_dict`` of an EMAHook is empty or has the tensors of the model and no others."""
    if not averaged:
        return True
    if not isinstance(averaged, dict):
        return False
    tensors = {str(name).removeprefix('module.'): value for name, value in averaged.items() if name != 'steps'}
    expected = state_shapes(model)
    are_tensors = all(isinstance(value, Tensor) for value in tensors.values())
    return are_tensors and tensors.keys() == expected.keys() and not find_mismatches(expected, tensors)
