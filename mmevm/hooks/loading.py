"""What a checkpoint has filled of a model before the training begins."""

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmevm.checkpoints import check_start, check_whole, model_of
from mmevm.registry import HOOKS


@HOOKS.register_module()
class LoadingHook(Hook):
    """Makes sure that a checkpoint fits the model, of which mmengine only warns.

    All of the model has to be in one that a training is resumed from (``resume=True``). Of one that it starts from
    (``load_from``) the log says how much there is, and what starts from other weights; nothing at all is an error.
    """

    priority = 'VERY_HIGH'  # before EMAHook swaps the averaged weights for the others

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare the two.

        Raises:
            CheckpointError: If the checkpoint does not fit.
        """
        check = check_whole if runner.cfg.get('resume') else check_start
        check(model_of(runner), checkpoint, str(runner.cfg.get('load_from')).removeprefix('mmevm://'))
