import datetime
import enum
import multiprocessing
import signal
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from recorded_training import BATCH, EPOCHS, PER_EPOCH, runner, train

from mmevm.checkpoints import CheckpointError
from mmevm.engine.training_state import check_training_checkpoint


def end_by_signal(*args, **kwargs):
    """Return what the iterations before SIGTERM have recorded."""
    run = runner(*args, **kwargs)
    with pytest.raises(SystemExit) as status:
        run.train()
    assert status.value.code == 143
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return run.model.seen


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize(('by_epoch', 'name'), [(True, 'epoch_1_iter_8.pth'), (False, 'iter_8.pth')])
def test_sigterm_saves_and_resume_continues_within_the_epoch(tmp_path, by_epoch, workers, name):
    uninterrupted = train(tmp_path / 'uninterrupted', by_epoch, workers)
    before = end_by_signal(tmp_path / 'here', by_epoch, workers, at=8)
    assert before == uninterrupted[:8]
    after = train(tmp_path / 'here', by_epoch, workers, checkpoint=tmp_path / 'here' / name)
    if by_epoch or not workers:
        assert after == uninterrupted[8:]
    assert len(after) == EPOCHS * PER_EPOCH - 8


@pytest.mark.parametrize('workers', [0, 2])
def test_sigterm_during_evaluation_saves_model_and_average(tmp_path, workers):
    loader = dict(
        batch_size=BATCH,
        num_workers=workers,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(type='Augmented'),
    )
    options = dict(val_dataloader=loader, val_cfg=dict(), val_evaluator=dict(type='Nothing'))
    options['custom_hooks'] = [dict(type='EMAHook', momentum=0.5)]
    options['default_hooks.checkpoint.interval'] = 1
    train(tmp_path / 'uninterrupted', options=options)
    end_by_signal(tmp_path / 'here', options=options, at=2, evaluating=True)
    expected, saved = (
        torch.load(tmp_path / path, weights_only=False)
        for path in ('uninterrupted/epoch_1.pth', 'here/epoch_1_iter_6.pth')
    )
    assert expected['state_dict']['weight'] != expected['ema_state_dict']['module.weight']
    for part in ('state_dict', 'ema_state_dict', 'optimizer'):
        assert str(saved[part]) == str(expected[part])
    after = train(tmp_path / 'here', options=options, checkpoint=tmp_path / 'here/epoch_1_iter_6.pth')
    assert len(after) == (EPOCHS - 1) * PER_EPOCH


@pytest.mark.parametrize(('at', 'predicted'), [(2, 2), (8, 12)])
def test_sigterm_during_evaluation_with_mmpretrain_ema_hook(tmp_path, at, predicted):
    """MMPretrain's EMAHook evaluates the average first and then the model."""
    loader = dict(batch_size=BATCH, sampler=dict(type='DefaultSampler', shuffle=False), dataset=dict(type='Augmented'))
    options = dict(val_dataloader=loader, val_cfg=dict(), val_evaluator=dict(type='Nothing'))
    options['custom_hooks'] = [dict(type='mmpretrain.EMAHook', momentum=0.5, evaluate_on_origin=True)]
    options['default_hooks.checkpoint.interval'] = 1
    run = runner(tmp_path, options=options, at=at, evaluating=True)
    with pytest.raises(SystemExit):
        run.train()
    assert run.model.calls['predict'] == predicted
    expected, saved = (
        torch.load(tmp_path / path, weights_only=False) for path in ('epoch_1.pth', 'epoch_1_iter_6.pth')
    )
    for part in ('state_dict', 'ema_state_dict', 'optimizer'):
        assert str(saved[part]) == str(expected[part])


@pytest.mark.parametrize('change', [{'train_dataloader.batch_size': 3}, {'train_cfg.type': 'CustomLoop'}])
def test_losing_the_place_in_the_epoch_is_a_warning(tmp_path, change, caplog):
    end_by_signal(tmp_path, at=8)
    run = runner(tmp_path, checkpoint=tmp_path / 'epoch_1_iter_8.pth', options=change)
    run.logger.addHandler(caplog.handler)
    run.train()
    assert 'after 2 of 6 batches' in caplog.text
    assert 'this epoch restarts' in caplog.text
    assert len(run.model.seen) == (EPOCHS - 1) * len(run.train_dataloader)


@pytest.mark.parametrize('handler', [signal.SIG_DFL, signal.SIG_IGN, lambda *_: None])
def test_previous_signal_handler_is_restored(tmp_path, handler):
    before = signal.signal(signal.SIGTERM, handler)
    try:
        train(tmp_path, options={'train_cfg.max_epochs': 1})
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


class Failing(Hook):
    def before_train_iter(self, *args, **kwargs):
        raise ZeroDivisionError


def test_signal_handler_is_restored_after_a_failed_training(tmp_path):
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        run = runner(tmp_path / 'failed')
        run.register_hook(Failing())
        with pytest.raises(ZeroDivisionError):
            run.train()
        train(tmp_path, options={'train_cfg.max_epochs': 1})
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_training_in_another_thread_warns_and_runs(tmp_path, caplog):
    run = runner(tmp_path, options={'train_cfg.max_epochs': 1})
    run.logger.addHandler(caplog.handler)
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run.train)
    thread.start()
    thread.join()
    assert len(run.model.seen) == PER_EPOCH
    assert 'PreemptionHook is off' in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before


@HOOKS.register_module()
class MetaHook(Hook):
    """Add custom metadata."""

    def __init__(self, **meta):
        self.meta = meta

    def before_save_checkpoint(self, runner, checkpoint):
        checkpoint['meta'].update(self.meta)


class Color(enum.Enum):
    RED = 1


def test_saving_warns_once_about_what_resume_refuses(tmp_path, caplog):
    meta = dict(kept={'date': datetime.date(2026, 1, 2)}, colors={'first': [0, Color.RED]})
    run = runner(tmp_path, options=dict(custom_hooks=[dict(type='MetaHook', **meta)]))
    run.logger.addHandler(caplog.handler)
    run.train()
    (warning,) = [record.getMessage() for record in caplog.records if '--resume will refuse' in record.getMessage()]
    assert warning.startswith(f'meta.colors.first.1 contains {__name__}.Color, ')
    assert 'torch.serialization.add_safe_globals' in warning
    with pytest.raises(CheckpointError, match=rf'{__name__}\.Color'):
        check_training_checkpoint(tmp_path / f'epoch_{EPOCHS}.pth')


def test_saving_warns_about_a_diverged_model(tmp_path, caplog):
    run = runner(tmp_path)
    run.logger.addHandler(caplog.handler)
    run.model.weight.data.fill_(torch.nan)
    run.train()
    assert caplog.text.count('NaN or infinite values (weight)') == 1


@pytest.mark.parametrize('entry', ['optimizer', 'param_scheduler'])
def test_resume_warns_about_parts_that_were_not_saved(tmp_path, caplog, entry):
    scheduler = dict(type='MultiStepLR', milestones=[1], by_epoch=True)
    options = {f'default_hooks.checkpoint.save_{entry}': False, 'param_scheduler': scheduler}
    train(tmp_path, options=options | {'default_hooks.checkpoint.interval': 1})
    run = runner(tmp_path, checkpoint=tmp_path / 'epoch_1.pth', options=options)
    run.logger.addHandler(caplog.handler)
    run.train()
    assert len(run.model.seen) == (EPOCHS - 1) * PER_EPOCH
    assert f'epoch_1.pth was saved with save_{entry}=False' in caplog.text


def _exit_with_handler():
    sys.exit(0 if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL else 1)


@pytest.mark.skipif('fork' not in multiprocessing.get_all_start_methods(), reason='no forks here')
def test_sigterm_ends_forked_processes():
    """VOCMetric's pool ends its processes by this signal and waits for them."""
    hook = HOOKS.build(dict(type='mmevm.PreemptionHook'))
    hook.before_run(SimpleNamespace(val_loop=None))
    try:
        process = multiprocessing.get_context('fork').Process(target=_exit_with_handler)
        process.start()
        process.join(10)
        assert process.exitcode == 0
        assert signal.getsignal(signal.SIGTERM) == hook._receive
    finally:
        process.kill()
        hook.after_run(None)
