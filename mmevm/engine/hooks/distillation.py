"""Who teaches a ``mmevm.DistillationClassifier``: its own average, or a larger network."""

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
from mmevm.checkpoints.convert import differences, some, state_shapes, unwrap
from mmevm.errors import ConfigError
from mmevm.models.weight_init import pretrained_cfgs
from mmevm.registry import HOOKS

if TYPE_CHECKING:  # classification needs MMPretrain, the other hooks do not
    from mmevm.models import DistillationClassifier


@HOOKS.register_module()
class MESAHook(Hook):
    """Lets a classifier learn from its own average (MESA: Du et al., Sharpness-Aware Training for Free, 2022).

    The average is that of mmengine's ``EMAHook``, which has to be there too.

    Args:
        begin: When it begins, as a share of the training: by then the average is worth hearing.

    Raises:
        ConfigError: If there is no ``EMAHook``, or the model cannot be taught in this way.
    """

    def __init__(self, begin: float = 0.25) -> None:
        if not 0 <= begin < 1:
            raise ValueError(f'begin={begin}: a share of the training, from 0 to below 1.')
        self.begin = begin

    def before_train(self, runner: Runner) -> None:
        """Find the average."""
        student = _student(runner, self)
        if student.head.distilled:
            raise ConfigError(
                'MESAHook is for heads with distilled=False: a distilled head learns from the teacher of '
                'DistillationHook. Leave one of the two out.'
            )
        averages = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
        if not averages:
            raise ConfigError(
                "MESAHook learns from the model's average, but there is no EMAHook: add dict(type='EMAHook', "
                'momentum=0.0005, update_buffers=True) to custom_hooks.'
            )
        self.teacher = _teacher(averages[0].ema_model.module)

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Begin when it is time, which on resuming may be at once."""
        student = _student(runner, self)
        if student.teacher is None and runner.iter >= self.begin * runner.max_iters:
            student.teacher = self.teacher
            print_log(f'MESA begins at iteration {runner.iter} of {runner.max_iters}.', logger='current')

    def after_train(self, runner: Runner) -> None:
        """Take the teacher away."""
        _student(runner, self).teacher = None


@HOOKS.register_module()
class DistillationHook(Hook):
    """Lets a classifier learn from a trained network, which stays as it is (hard distillation, as in DeiT).

    Args:
        teacher: Config of the teacher, a classifier of mmpretrain or, by its ``TimmClassifier``, of timm. It sees the
            student's images, normalised as for the student.

    Raises:
        ConfigError: If the teacher has no weights, or the model cannot be taught in this way.
        CheckpointError: If the teacher's weights cannot be had, or are not those of the whole network.
    """

    def __init__(self, teacher: dict) -> None:
        weights = [teacher.get('pretrained'), teacher.get('checkpoint_path'), pretrained_cfgs(teacher.get('init_cfg'))]
        if not any(weights):
            raise ConfigError(
                f'DistillationHook: the teacher {teacher.get("type")} has random weights. Give it pretrained=True or '
                "checkpoint_path=… (TimmClassifier), or init_cfg=dict(type='Pretrained', checkpoint=…) (of mmpretrain)."
            )
        self.teacher = teacher

    def before_train(self, runner: Runner) -> None:
        """Build the teacher, and load every tensor of it."""
        student = _student(runner, self)
        if not student.head.distilled:
            raise ConfigError(
                'DistillationHook is for heads with distilled=True, which have classifiers of their own for the '
                "teacher's answers: set model.head.distilled=True."
            )
        teacher = _build(self.teacher)
        for cfg in pretrained_cfgs(teacher.init_cfg):
            _load(teacher, **cfg)
        device = next(student.parameters()).device
        student.teacher = _teacher(teacher.to(device).requires_grad_(False))

    def after_train(self, runner: Runner) -> None:
        """Take the teacher away."""
        _student(runner, self).teacher = None


def _student(runner: Runner, hook: Hook) -> 'DistillationClassifier':
    student: Any = unwrap_model(runner)
    if not (hasattr(student, 'teacher') and hasattr(getattr(student, 'head', None), 'distilled')):
        raise ConfigError(
            f"{type(hook).__name__} needs model.type='mmevm.DistillationClassifier' and "
            f"model.head.type='mmevm.FusionClsHead', but the model is {type(student).__name__}."
        )
    return student


def _build(cfg: dict) -> BaseModule:
    try:
        return MODELS.build(cfg)
    except OSError as error:  # of the hub, whose errors are of this kind, or of a file
        raise CheckpointError(
            f'DistillationHook: the weights of the teacher {cfg.get("model_name", cfg["type"])} could not be had '
            f'({type(error).__name__}): fetch them elsewhere, and give checkpoint_path=… in place of pretrained=True.'
        ) from error


def _load(teacher: nn.Module, checkpoint: str, prefix: str | None = None, map_location: str = 'cpu') -> None:
    # mmengine's loading would only warn of what is missing, and its init_weights gives a timm model random weights.
    raw, _, _ = unwrap(fetch_checkpoint(checkpoint, map_location))
    prefix = f'{prefix.rstrip(".")}.' if prefix else ''
    state = {name.removeprefix(prefix): tensor for name, tensor in raw.items() if name.startswith(prefix)}
    expected = state_shapes(teacher)
    if problems := differences(expected, state):
        raise CheckpointError(
            f'DistillationHook: {checkpoint} is not one of the teacher, which has {len(expected)} tensors: '
            f'{"; ".join(problems)}. The file has {some(raw)}. Give a file of this very network, or init_cfg.prefix if '
            'its names begin with one.'
        )
    teacher.load_state_dict({name: state[name] for name in expected})


def _teacher(model: nn.Module) -> Callable[[Tensor], Tensor]:
    # A function, not a module: a module would become part of the student, of its checkpoints and of its optimiser.
    return partial(model.eval(), mode='tensor')
