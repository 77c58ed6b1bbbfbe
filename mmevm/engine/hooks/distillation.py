"""MESA and hard-distillation hooks."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch import Tensor, nn

from mmevm.checkpoints import CheckpointError, fetch_checkpoint, unwrap_model
from mmevm.checkpoints.state_dict import find_mismatches, preview, state_shapes, unwrap
from mmevm.errors import ConfigError
from mmevm.models.weight_init import pretrained_cfgs
from mmevm.registry import HOOKS

if TYPE_CHECKING:  # needs MMPretrain, which detectors do without
    from mmevm.models import DistillationClassifier


@HOOKS.register_module()
class MESAHook(Hook):
    """Train a classifier with its averaged weights as teacher (MESA).

    Source: Du et al., Sharpness-Aware Training for Free, 2022. The average is that of ``EMAHook``, which must be in the
    config too.

    Args:
        begin: Fraction of the training after which MESA begins, in [0, 1).

    Raises:
        ConfigError: If there is no ``EMAHook``, or the model is not a DistillationClassifier without distilled head.
    """

    def __init__(self, begin: float = 0.25) -> None:
        if not 0 <= begin < 1:
            raise ValueError(f'begin={begin} must be a fraction of the training, at least 0 and below 1.')
        self.begin = begin

    def before_train(self, runner: Runner) -> None:
        """Find the averaged model."""
        student = _student(runner, self)
        if student.head.distilled:
            raise ConfigError(
                'model.head.distilled=True does not work with MESAHook: distilled heads learn from the teacher of '
                'DistillationHook. Set model.head.distilled=False, or remove MESAHook from custom_hooks.'
            )
        averages = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
        if not averages:
            raise ConfigError(
                "custom_hooks has no EMAHook, whose averaged model MESAHook needs. Add dict(type='EMAHook', "
                'momentum=0.0005, update_buffers=True).'
            )
        self.teacher = _teacher(averages[0].ema_model.module)

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Set the teacher after the given fraction of the training, or at once when resuming later."""
        student = _student(runner, self)
        if student.teacher is None and runner.iter >= self.begin * runner.max_iters:
            student.teacher = self.teacher
            print_log(f'MESA begins at iteration {runner.iter} of {runner.max_iters}.', logger='current')

    def after_train(self, runner: Runner) -> None:
        """Remove the teacher."""
        _student(runner, self).teacher = None


@HOOKS.register_module()
class DistillationHook(Hook):
    """Attach a frozen teacher to the classifier for hard distillation (DeiT).

    Args:
        teacher: Config of the teacher, a classifier of MMPretrain or, as ``TimmClassifier``, of timm. It receives the
            images of the student, (B, 3, H, W), normalized for the student.

    Raises:
        ConfigError: If the teacher has no pretrained weights, or the model is not a DistillationClassifier with a
            distilled head.
        CheckpointError: If the teacher's weights cannot be downloaded or read, or do not have all of its tensors.
    """

    def __init__(self, teacher: dict) -> None:
        weights = [teacher.get('pretrained'), teacher.get('checkpoint_path'), pretrained_cfgs(teacher.get('init_cfg'))]
        if not any(weights):
            raise ConfigError(
                f'DistillationHook: teacher {teacher.get("type")} has random weights. Set pretrained=True or '
                "checkpoint_path (TimmClassifier), or init_cfg=dict(type='Pretrained', checkpoint=…) (MMPretrain)."
            )
        self.teacher = teacher

    def before_train(self, runner: Runner) -> None:
        """Build the teacher, and load every tensor of it."""
        student = _student(runner, self)
        if not student.head.distilled:
            raise ConfigError(
                'model.head.distilled=False does not work with DistillationHook, which trains additional classifiers. '
                'Set model.head.distilled=True.'
            )
        teacher = _build(self.teacher)
        for cfg in pretrained_cfgs(teacher.init_cfg):
            _load(teacher, **cfg)
        device = next(student.parameters()).device
        student.teacher = _teacher(teacher.to(device).requires_grad_(False))

    def after_train(self, runner: Runner) -> None:
        """Remove the teacher."""
        _student(runner, self).teacher = None


def _student(runner: Runner, hook: Hook) -> 'DistillationClassifier':
    student: Any = unwrap_model(runner)
    if not (hasattr(student, 'teacher') and hasattr(getattr(student, 'head', None), 'distilled')):
        raise ConfigError(
            f'The model is {type(student).__name__}, but {type(hook).__name__} needs '
            "model.type='mmevm.DistillationClassifier' and model.head.type='mmevm.FusionClsHead'."
        )
    return student


def _build(cfg: dict) -> BaseModule:
    try:
        return MODELS.build(cfg)
    except OSError as error:  # of the Hugging Face Hub or of a file
        raise CheckpointError(
            f'DistillationHook: download of the weights of teacher {cfg.get("model_name", cfg["type"])} failed '
            f'({type(error).__name__}). Download them by other means and set checkpoint_path, not pretrained=True.'
        ) from error


def _load(teacher: nn.Module, checkpoint: str, prefix: str | None = None, map_location: str = 'cpu') -> None:
    # mmengine would only warn of missing tensors, and its init_weights gives a timm model random weights.
    raw, _, _ = unwrap(fetch_checkpoint(checkpoint, map_location))
    prefix = f'{prefix.rstrip(".")}.' if prefix else ''
    state = {name.removeprefix(prefix): tensor for name, tensor in raw.items() if name.startswith(prefix)}
    expected = state_shapes(teacher)
    if problems := find_mismatches(expected, state):
        raise CheckpointError(
            f'DistillationHook: {checkpoint} does not fit the teacher, which has {len(expected)} tensors: '
            f'{"; ".join(problems)}. The names in the file are {preview(raw)}. Use a file of this network, or set '
            'init_cfg.prefix to the prefix of its names.'
        )
    teacher.load_state_dict({name: state[name] for name in expected})


def _teacher(model: nn.Module) -> Callable[[Tensor], Tensor]:
    # A function, because a module would become part of the student, its checkpoints and its optimizer.
    return partial(model.eval(), mode='tensor')
