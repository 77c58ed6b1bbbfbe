"""Training with ``randomness.deterministic=True`` must run, as it does with mmcv's compiled operators."""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from mmcv.ops import deform_conv2d, deform_roi_pool, modulated_deform_conv2d, roi_align, roi_pool
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmevm.mmcv_ops.determinism import allow_nondeterministic

# Kernels that call alertNotDeterministic on CUDA in any version since torch 2.1 and torchvision 0.16.
NONDETERMINISTIC = {
    'aten::grid_sampler_2d_backward',
    'aten::scatter_',
    'torchvision::_deform_conv2d_backward',
    'torchvision::_roi_align_backward',
    'torchvision::_roi_pool_backward',
}


class CudaDeterminism(TorchDispatchMode):
    """Raise errors on the CPU where CUDA would, and record the kernels that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in NONDETERMINISTIC:
            self.ran.add(name)
            if torch.get_deterministic_debug_mode() == 2:
                raise RuntimeError(f'{name} does not have a deterministic implementation')
        return func(*args, **(kwargs or {}))


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def rois() -> Tensor:
    corners = torch.rand(5, 2) * 4
    return torch.cat([torch.zeros(5, 1), corners, corners + 1 + torch.rand(5, 2) * 3], dim=1)


def attention(value: Tensor) -> Tensor:
    shapes, starts = torch.tensor([[4, 3], [2, 2]]), torch.tensor([0, 12])
    locations, weights = torch.rand(1, 5, 2, 2, 3, 2), torch.rand(1, 5, 2, 2, 3)
    return MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)


OPERATORS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    'roi_align': (lambda maps: roi_align(maps, rois(), 3, 1.0, 2), (1, 2, 9, 8)),
    'roi_align by maximum': (lambda maps: roi_align(maps, rois(), 3, 1.0, 2, 'max'), (1, 2, 9, 8)),
    'roi_pool': (lambda maps: roi_pool(maps, rois(), 3), (1, 2, 9, 8)),
    'deform_roi_pool': (lambda maps: deform_roi_pool(maps, rois(), torch.rand(5, 2, 3, 3), 3), (1, 2, 9, 8)),
    'deform_conv2d': (
        lambda maps: deform_conv2d(maps, torch.rand(1, 18, 7, 6), torch.rand(3, 2, 3, 3).requires_grad_()),
        (1, 2, 9, 8),
    ),
    'modulated_deform_conv2d': (
        lambda maps: modulated_deform_conv2d(
            maps, torch.rand(1, 18, 7, 6), torch.rand(1, 9, 7, 6), torch.rand(3, 2, 3, 3), None, 1, 0, 1, 1, 1
        ),
        (1, 2, 9, 8),
    ),
    'ms_deform_attn': (attention, (1, 16, 2, 4)),
}


@pytest.mark.usefixtures('deterministic')
@pytest.mark.parametrize('operator', OPERATORS)
def test_backward_pass_runs_in_deterministic_mode(operator: str) -> None:
    function, shape = OPERATORS[operator]
    x = torch.rand(shape, requires_grad=True)
    with CudaDeterminism() as mode:
        function(x).sum().backward()
    assert mode.ran
    assert x.grad.any()
    assert torch.get_deterministic_debug_mode() == 2


@pytest.mark.parametrize('mode', [0, 1, 2])
def test_mode_is_restored_after_an_error(mode: int) -> None:
    torch.set_deterministic_debug_mode(mode)
    try:
        with contextlib.suppress(ValueError), allow_nondeterministic():
            assert torch.get_deterministic_debug_mode() == min(mode, 1)
            raise ValueError
        assert torch.get_deterministic_debug_mode() == mode
    finally:
        torch.set_deterministic_debug_mode(0)


@pytest.mark.usefixtures('deterministic')
def test_pytorch_warns_instead_of_raising() -> None:
    """``put_`` raises an error on the CPU as well."""
    x = torch.zeros(3)
    with pytest.raises(RuntimeError, match='deterministic'):
        x.put_(torch.tensor([1]), torch.ones(1))
    with warnings.catch_warnings(record=True) as caught, allow_nondeterministic():
        warnings.simplefilter('always')
        x.put_(torch.tensor([1]), torch.ones(1))
    assert any('deterministic' in str(warning.message) for warning in caught)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.usefixtures('deterministic')
@pytest.mark.parametrize('operator', OPERATORS)
def test_backward_pass_runs_in_deterministic_mode_on_cuda(operator: str) -> None:
    function, shape = OPERATORS[operator]
    with torch.device('cuda'):
        x = torch.rand(shape, requires_grad=True)
        function(x).sum().backward()
    assert x.grad.any()
