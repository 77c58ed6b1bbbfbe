from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mmcv.ops import SyncBatchNorm
from torch import nn

pytestmark = pytest.mark.usefixtures('each_device')


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize('stats_mode', ['default', 'N'])
@pytest.mark.usefixtures('process_group')
def test_one_process_is_ordinary_batch_norm(stats_mode: str) -> None:
    reference, module = nn.BatchNorm2d(5), SyncBatchNorm(5, stats_mode=stats_mode)
    reference.load_state_dict(module.state_dict())
    outcomes = []
    maps = torch.randn(3, 5, 4, 6) * 3 + 1
    for layer in (reference, module):
        x = maps.clone().requires_grad_()
        output = layer(x)
        (output**3).sum().backward()
        outcomes.append([output, x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var])
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures('process_group')
def test_an_empty_batch_changes_no_statistics() -> None:
    module = SyncBatchNorm(5, stats_mode='N')
    assert module(torch.zeros(0, 5, 4, 6)).shape == (0, 5, 4, 6)
    assert not module.running_mean.any()
    assert (module.running_var == 1).all()


@pytest.mark.usefixtures('process_group')
def test_half_precision() -> None:
    module = SyncBatchNorm(5)
    maps = torch.randn(3, 5, 4, 6).half().requires_grad_()
    output = module(maps)
    torch.testing.assert_close(output, module(maps.float()).half())
    (grad,) = torch.autograd.grad(output.sum(), maps)
    assert grad.dtype == torch.float16
