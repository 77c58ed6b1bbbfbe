"""What a checkpoint has filled of a model before the training begins."""

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmevm.checkpoints import check_partial, check_strict, unwrap_model
from mmevm.registry import HOOKS


@HOOKS.register_module()
class CheckpointCheckHook(Hook):
    """Makes sure that a checkpoint fits the model, of which mmengine only warns.

    All of the model has to be in one that a training is resumed from (``resume=True``). Of one that it starts from
    (``load_from``) the log says how much there is, and what starts from other weights; nothing at all is an error.
    A warning names what else mmengine cannot resume, because it was not saved.
    """

    priority = 'VERY_HIGH'  # before EMAHook swaps the averaged weights for the others

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare the two.

        Raises:
            CheckpointError: If the checkpoint does not fit.
        """
        name = str(runner.cfg.get('load_from')).removeprefix('safe://')
        if not runner.cfg.get('resume'):
            check_partial(unwrap_model(runner), checkpoint, name)
            return
        check_strict(unwrap_model(runner), checkpoint, name)
        if 'optimizer' not in checkpoint:
            runner.logger.warning(
                f'{name} was saved with save_optimizer=False: the optimizer starts anew. The schedulers go on from its '
                'initial learning rate, or from that at the start of a warm-up, not from the one at the checkpoint: '
                'compare lr in the log.'
            )
        if 'param_schedulers' not in checkpoint and runner.param_schedulers:
            runner.logger.warning(f'{name} was saved with save_param_scheduler=False: the schedulers start anew.')
