"""Fixtures: reference implementations, devices, and a skip if mmcv has compiled operators."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mmevm.mmcv_ops

mmevm.mmcv_ops.register()


@pytest.fixture(autouse=True, scope='session')
def skip_if_compiled() -> None:
    spec = importlib.util.find_spec('mmcv._ext')
    if Path(spec.origin).parent != Path(mmevm.mmcv_ops.__file__).parent:
        pytest.skip(f'these tests are for the fallback operators, but mmcv uses {spec.origin}')


@pytest.fixture(params=['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu'])
def each_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make this the default device and set the seed."""
    torch.manual_seed(0)
    with torch.device(request.param):
        yield


@pytest.fixture(scope='session')
def bilinear() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return _bilinear


@pytest.fixture(scope='session')
def bilinear_with_border() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return _bilinear_with_border


def _bilinear(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Sample (C, H, W) at any points by linear interpolation. Values outside are 0."""
    rows = (1 - (y[..., None] - torch.arange(image.shape[1])).abs()).clamp(min=0)
    columns = (1 - (x[..., None] - torch.arange(image.shape[2])).abs()).clamp(min=0)
    return torch.einsum('chw,...h,...w->c...', image, rows, columns)


def _bilinear_with_border(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Sample as RoIAlign does: up to one pixel outside, samples have the value of the border."""
    height, width = image.shape[1:]
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    return _bilinear(image, y.clamp(0, height - 1), x.clamp(0, width - 1)) * inside
