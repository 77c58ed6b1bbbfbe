import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import nn
from torch.torch_version import TorchVersion

from mmevm.engine import use_fused_optimizer

IS_USED = not torch.cuda.is_available() and TorchVersion(torch.__version__) >= (2, 4)


def make_config(optimizer):
    return Config(dict(optim_wrapper=dict(optimizer=optimizer, paramwise_cfg=dict(norm_decay_mult=0.0))))


def train(cfg):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4))
    optim_wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    for _ in range(5):
        optim_wrapper.update_params((model(torch.rand(3, 5)) ** 3).sum())
    return list(model.parameters())


@pytest.mark.skipif(not IS_USED, reason='needs torch 2.4 or newer, and no GPU')
@pytest.mark.parametrize('kind', ['AdamW', torch.optim.Adam, 'SGD'])
def test_fused_optimizers_give_the_same_weights(kind):
    cfg = make_config(dict(type=kind, lr=0.1, weight_decay=0.1))
    expected = train(cfg)
    use_fused_optimizer(cfg)
    assert cfg.optim_wrapper.optimizer.fused
    torch.testing.assert_close(train(cfg), expected)


@pytest.mark.parametrize(
    'optimizer', [dict(type='Adamax'), dict(type='AdamW', foreach=True), dict(type='AdamW', fused=False)]
)
def test_others_are_not_changed(optimizer):
    cfg = make_config(optimizer)
    use_fused_optimizer(cfg)
    assert cfg.optim_wrapper.optimizer == optimizer


@pytest.mark.skipif(not IS_USED, reason='needs torch 2.4 or newer, and no GPU')
def test_only_on_a_cpu_and_with_torch_2_4(monkeypatch):
    for target, value in [('mmevm.engine.optimizer.get_device', lambda: 'npu'), ('torch.__version__', '2.3.1')]:
        cfg = make_config(dict(type='AdamW'))
        with monkeypatch.context() as patch:
            patch.setattr(target, value)
            use_fused_optimizer(cfg)
        assert cfg.optim_wrapper.optimizer == dict(type='AdamW')


def test_several_optimizers_are_not_changed():
    cfg = Config(dict(optim_wrapper=dict(constructor='Mine', one=dict(optimizer=dict(type='AdamW')))))
    expected = cfg.to_dict()
    use_fused_optimizer(cfg)
    assert cfg.to_dict() == expected
    use_fused_optimizer(Config(dict(optim_wrapper=None)))  # of a config for evaluation
