"""Independent references, and what keeps these tests from testing mmcv's own compiled operators."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import mmevm.mmcv_ops

mmevm.mmcv_ops.register()


@pytest.fixture(autouse=True, scope='session')
def stand_in() -> None:
    spec = importlib.util.find_spec('mmcv._ext')
    if Path(spec.origin).parent != Path(mmevm.mmcv_ops.__file__).parent:
        pytest.skip(f'mmcv has operators of its own ({spec.origin}), and these tests are of the stand-in')


@pytest.fixture(params=['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu'])
def each_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """New tensors are made there, the same ones each time."""
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
    """Samples of (C, H, W) at any points: each pixel is a tent of width 2, and outside there are zeros."""
    rows = (1 - (y[..., None] - torch.arange(image.shape[1])).abs()).clamp(min=0)
    columns = (1 - (x[..., None] - torch.arange(image.shape[2])).abs()).clamp(min=0)
    return torch.einsum('chw,...h,...w->c...', image, rows, columns)


def _bilinear_with_border(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The same, but one pixel around the image repeats its border, as in RoIAlign."""
    height, width = image.shape[1:]
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    return _bilinear(image, y.clamp(0, height - 1), x.clamp(0, width - 1)) * inside
