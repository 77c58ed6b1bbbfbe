from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mmcv.ops import SyncBatchNorm
from torch import nn

from mmevm.mmcv_ops.ext import sync_bn_forward_output

pytestmark = pytest.mark.usefixtures('each_device')


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize('shape', [(3, 5, 4, 6), (2, 5, 1, 1)])
@pytest.mark.parametrize('stats_mode', ['default', 'N'])
@pytest.mark.usefixtures('process_group')
def test_single_process_equals_batch_norm(stats_mode: str, shape: tuple[int, ...]) -> None:
    reference, module = nn.BatchNorm2d(5, eps=0.3), SyncBatchNorm(5, eps=0.3, stats_mode=stats_mode)
    with torch.no_grad():
        for tensor in (reference.weight, reference.bias, reference.running_mean):
            tensor.normal_()
        reference.running_var.uniform_(0.5, 1.5)
    module.load_state_dict(reference.state_dict())
    outcomes = []
    maps = torch.randn(shape) * 3 + 1
    for layer in (reference, module):
        x = maps.clone().requires_grad_()
        output = layer(x)
        (output**3).sum().backward()
        outcomes.append([output, x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var])
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-4)


def test_running_variance_covers_all_processes() -> None:
    """Run the output step as the first of two processes."""
    reference = nn.BatchNorm2d(5)
    maps = torch.randn(6, 5, 4, 6)
    reference(maps)
    local = maps[:3].flatten(2)
    mean, var = maps.mean(dim=(0, 2, 3)), maps.var(dim=(0, 2, 3), unbiased=False)
    running_mean, running_var = torch.zeros(5), torch.ones(5)
    norm, output, std = torch.empty_like(local), torch.empty_like(local), torch.empty(5)
    sync_bn_forward_output(
        local,
        mean,
        var,
        torch.ones(5),
        torch.zeros(5),
        running_mean,
        running_var,
        norm,
        std,
        output,
        eps=reference.eps,
        momentum=reference.momentum,
        group_size=2,
    )
    torch.testing.assert_close([running_mean, running_var], [reference.running_mean, reference.running_var])


@pytest.mark.usefixtures('process_group')
def test_empty_batch_keeps_statistics() -> None:
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
