"""CheckpointCheckHook(strict=True), which tools/test.py uses; test_foreign_trainings.py trains with the hook."""

import pytest
import torch
from checkpoint_formats import assert_same
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner, runner
from randomize import randomize
from torch import nn

from mmevm.checkpoints import CheckpointError


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


class ChangingHook(Hook):
    """Record a checkpoint and change a weight, as EMAHook does, which is not ready before ``before_run``."""

    priority = 'VERY_LOW'
    is_ready = False
    checkpoint = None

    def before_run(self, runner):
        self.is_ready = True

    def after_load_checkpoint(self, runner, checkpoint):
        assert self.is_ready
        self.checkpoint = dict(checkpoint)
        checkpoint['state_dict']['0.bias'] = torch.arange(3.0)


@pytest.fixture
def evaluate(tmp_path, monkeypatch, caplog):
    """Save a checkpoint and load it as tools/test.py does; return the model and what the other hooks received."""
    monkeypatch.setattr(runner, 'collect_env', dict)  # runs compilers for their versions

    def load(content):
        path, hook = tmp_path / 'x.pth', ChangingHook()
        torch.save(content, path)
        load_from = f'safe://{path}'
        hooks = [hook, dict(type='mmevm.CheckpointCheckHook', strict=True)]
        cfg = Config(dict(load_from=load_from))
        made = Runner(small_model(), str(tmp_path), load_from=load_from, custom_hooks=hooks, cfg=cfg)
        made.logger.addHandler(caplog.handler)
        try:
            made.call_hook('before_run')
            made.load_or_resume()
        finally:
            made.logger.removeHandler(caplog.handler)
        return made.model, hook.checkpoint

    return load


@pytest.mark.parametrize(
    ('averaged', 'is_kept'),
    [
        (None, True),
        ({}, True),
        (lambda state: {'steps': torch.tensor(5), **{f'module.{name}': state[name] for name in state}}, True),
        (lambda state: dict(state, steps=5), True),
        (lambda state: {f'module.{name}': state[name] for name in state if name != '0.bias'}, False),
        (lambda state: {f'module.{name}': state[name].flatten() for name in state}, False),
        (lambda state: {'module.0.bias': 'x'}, False),
        (lambda state: [1], False),
    ],
)
def test_other_hooks_receive_the_checkpoint_without_ema_weights_of_another_model(evaluate, caplog, averaged, is_kept):
    state = randomize(small_model()).state_dict()
    content = {'state_dict': state, 'meta': {}}
    if averaged is not None:
        content['ema_state_dict'] = averaged(state) if callable(averaged) else averaged
    model, received = evaluate(content)
    assert received.keys() == content.keys() - ({'ema_state_dict'} if not is_kept else set())
    assert_same(model.state_dict(), {**state, '0.bias': torch.arange(3.0)})
    assert ('ema_state_dict does not match the model and is not used' in caplog.text) == (not is_kept)
    assert 'Loaded 7/7 tensors of Sequential' in caplog.text


def test_bare_state_dict_is_loaded(evaluate):
    state = randomize(small_model()).state_dict()
    model, received = evaluate(state)
    assert received.keys() == {'state_dict'}
    assert_same(model.state_dict(), {**state, '0.bias': torch.arange(3.0)})


def test_incomplete_checkpoint_is_an_error(evaluate):
    state = randomize(small_model()).state_dict()
    del state['0.bias']
    with pytest.raises(CheckpointError, match=r'x\.pth does not fit .* 1 missing \(0\.bias\)'):
        evaluate({'state_dict': state})
