import signal

import pytest
import torch
from recorded_training import BATCH, EPOCHS, PER_EPOCH, runner, train


def end_by_signal(*args, **kwargs):
    """What the iterations before SIGTERM have seen."""
    run = runner(*args, **kwargs)
    with pytest.raises(SystemExit) as status:
        run.train()
    assert status.value.code == 143
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return run.model.seen


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize(('by_epoch', 'name'), [(True, 'epoch_1_iter_8.pth'), (False, 'iter_8.pth')])
def test_sigterm_saves_and_the_training_goes_on_within_the_epoch(tmp_path, by_epoch, workers, name):
    whole = train(tmp_path / 'whole', by_epoch, workers)
    before = end_by_signal(tmp_path / 'here', by_epoch, workers, at=8)
    assert before == whole[:8]
    after = train(tmp_path / 'here', by_epoch, workers, checkpoint=tmp_path / 'here' / name)
    if by_epoch or not workers:
        assert after == whole[8:]
    assert len(after) == EPOCHS * PER_EPOCH - 8


@pytest.mark.parametrize('workers', [0, 2])
def test_sigterm_while_evaluating_saves_the_model_and_its_average(tmp_path, workers):
    loader = dict(
        batch_size=BATCH,
        num_workers=workers,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=dict(type='Augmented'),
    )
    options = dict(val_dataloader=loader, val_cfg=dict(), val_evaluator=dict(type='Nothing'))
    options['custom_hooks'] = [dict(type='EMAHook', momentum=0.5)]
    options['default_hooks.checkpoint.interval'] = 1
    train(tmp_path / 'whole', options=options)
    end_by_signal(tmp_path / 'here', options=options, at=2, evaluating=True)
    expected, saved = (
        torch.load(tmp_path / path, weights_only=False) for path in ('whole/epoch_1.pth', 'here/epoch_1_iter_6.pth')
    )
    assert expected['state_dict']['weight'] != expected['ema_state_dict']['module.weight']
    for part in ('state_dict', 'ema_state_dict', 'optimizer'):
        assert str(saved[part]) == str(expected[part])
    after = train(tmp_path / 'here', options=options, checkpoint=tmp_path / 'here/epoch_1_iter_6.pth')
    assert len(after) == (EPOCHS - 1) * PER_EPOCH


@pytest.mark.parametrize('change', [{'train_dataloader.batch_size': 3}, {'train_cfg.type': 'OwnLoop'}])
def test_where_the_place_within_the_epoch_is_lost_a_warning_says_so(tmp_path, change, caplog):
    end_by_signal(tmp_path, at=8)
    run = runner(tmp_path, checkpoint=tmp_path / 'epoch_1_iter_8.pth', options=change)
    run.logger.addHandler(caplog.handler)
    run.train()
    assert 'after 2 of 6 batches' in caplog.text
    assert 'this epoch begins anew' in caplog.text
    assert len(run.model.seen) == (EPOCHS - 1) * len(run.train_dataloader)


def test_the_signal_ends_a_process_again_after_the_training(tmp_path):
    train(tmp_path, options={'train_cfg.max_epochs': 1})
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
