import pytest
import torch
from mmcv.ops import MaskedConv2d

pytestmark = pytest.mark.usefixtures('each_device')


@pytest.mark.parametrize(('kernel', 'padding'), [(3, 1), (1, 0), ((3, 5), (1, 2))])
def test_equals_dense_convolution_inside_mask(kernel, padding) -> None:
    module = MaskedConv2d(4, 6, kernel, padding=padding)
    maps = torch.rand(1, 4, 9, 7)
    mask = torch.rand(1, 9, 7) > 0.6
    with torch.no_grad():
        torch.testing.assert_close(module(maps, mask), module(maps) * mask)


def test_empty_mask_gives_zeros() -> None:
    module = MaskedConv2d(4, 6, 3, padding=1)
    assert not module(torch.rand(1, 4, 9, 7), torch.zeros(1, 9, 7)).any()


def test_mixed_precision() -> None:
    module = MaskedConv2d(4, 6, 3, padding=1)
    maps, mask = torch.rand(1, 4, 9, 7), torch.rand(1, 9, 7) > 0.6
    with torch.no_grad(), torch.autocast(maps.device.type, torch.bfloat16):
        mixed = module(maps, mask)
    torch.testing.assert_close(mixed.float(), module(maps, mask), rtol=0.02, atol=0.02)
