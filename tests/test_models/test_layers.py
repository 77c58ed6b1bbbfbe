import copy

import pytest
import torch
from torch import nn

from mmevm.models.layers import FFN, ChannelLayerNorm, ConvNorm, PatchMerging, Stem

BN = dict(type='BN')


class TestChannelLayerNorm:
    def test_by_its_formula_and_gradcheck(self):
        norm = ChannelLayerNorm(5).double()
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        x = torch.randn(2, 5, 3, 4, dtype=torch.double, requires_grad=True)
        centred = x - x.mean(1, keepdim=True)
        expected = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        expected = expected * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        torch.testing.assert_close(norm(x), expected)
        assert torch.autograd.gradcheck(norm, x)

    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
    def test_neither_overflows_nor_loses_the_mean_in_half_precision(self, dtype):
        # Squares of 1e4 exceed float16, and beside a mean of 1000 bfloat16 cannot hold a deviation of 1.
        norm = ChannelLayerNorm(64)
        nn.init.normal_(norm.weight)
        for mean, deviation in [(0.0, 1e4), (1000.0, 8.0)]:
            x = (mean + deviation * torch.randn(1, 64, 8, 8)).to(dtype)
            out = norm(x)
            assert out.dtype == dtype
            # No error but that of rounding the result.
            exact = copy.deepcopy(norm).double()(x.double())
            torch.testing.assert_close(out.double(), exact, rtol=0.6 * torch.finfo(dtype).eps, atol=1e-4)


def test_conv_norm_order_and_names():
    conv = ConvNorm(3, 4, 3, stride=2, norm_cfg=BN, relu=True).eval()
    assert list(dict(conv.named_parameters())) == ['conv.weight', 'norm.weight', 'norm.bias']
    nn.init.normal_(conv.norm.bias)
    x = torch.randn(2, 3, 7, 10)
    torch.testing.assert_close(conv(x), conv.norm(conv.conv(x)).clamp(min=0))
    assert conv(x).shape == (2, 4, 4, 5)


def test_stem_has_no_relu_at_its_end():
    stem = Stem(3, 16, BN)
    out = stem(torch.randn(2, 3, 70, 33))
    assert out.shape == (2, 16, 5, 3)
    assert out.min() < 0
    inner = stem.conv[:3](torch.randn(2, 3, 70, 33))
    assert inner.min() == 0


def test_ffn_mixes_channels_of_each_pixel_alone():
    ffn = FFN(6, 24, BN).eval()
    x = torch.randn(1, 6, 4, 4)
    torch.testing.assert_close(ffn(x)[..., 1:2, 2:3], ffn(x[..., 1:2, 2:3]))


def test_patch_merging_halves_and_its_shortcuts_carry_the_image():
    merge = PatchMerging(6, 10, BN).eval()
    assert merge(torch.randn(2, 6, 7, 4)).shape == (2, 10, 4, 2)
    for conv in (merge.dwconv1, merge.dwconv2):
        nn.init.zeros_(conv.norm.weight)
    x = torch.randn(2, 6, 7, 4)
    torch.testing.assert_close(merge(x), merge.conv(x))
