import copy

import pytest
import torch
from torch import nn

from mmevm.models.layers import FFN, ConvNorm, LayerNorm2d, PatchMerging, Stem

BN = dict(type='BN')


class TestLayerNorm2d:
    def test_agrees_with_its_formula_and_gradcheck(self):
        norm = LayerNorm2d(5).double()
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        x = torch.randn(2, 5, 3, 4, dtype=torch.double, requires_grad=True)
        centered = x - x.mean(1, keepdim=True)
        expected = centered / (centered.square().mean(1, keepdim=True) + 1e-5).sqrt()
        expected = expected * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        torch.testing.assert_close(norm(x), expected)
        assert torch.autograd.gradcheck(norm, x)

    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
    def test_half_precision_adds_only_rounding_of_the_output(self, dtype):
        # Squares of 1e4 overflow float16, and bfloat16 has too few digits for a deviation of 1 from a mean of 1000.
        norm = LayerNorm2d(64)
        nn.init.normal_(norm.weight)
        for mean, deviation in [(0.0, 1e4), (1000.0, 8.0)]:
            x = (mean + deviation * torch.randn(1, 64, 8, 8)).to(dtype)
            out = norm(x)
            assert out.dtype == dtype
            # The only error is that of rounding the output.
            exact = copy.deepcopy(norm).double()(x.double())
            torch.testing.assert_close(out.double(), exact, rtol=0.6 * torch.finfo(dtype).eps, atol=1e-4)


def test_conv_norm_order_and_names():
    conv = ConvNorm(3, 4, 3, stride=2, norm_cfg=BN, relu=True).eval()
    assert list(dict(conv.named_parameters())) == ['conv.weight', 'norm.weight', 'norm.bias']
    nn.init.normal_(conv.norm.bias)
    x = torch.randn(2, 3, 7, 10)
    torch.testing.assert_close(conv(x), conv.norm(conv.conv(x)).clamp(min=0))
    assert conv(x).shape == (2, 4, 4, 5)


@pytest.mark.parametrize('affine', [True, False])
def test_conv_norm_with_fixed_statistics_has_the_same_gradients_and_keeps_less(affine):
    layer = ConvNorm(3, 4, 3, norm_cfg=dict(BN, affine=affine), relu=True).double().train()
    layer.norm.eval()
    layer.norm.running_mean.normal_()
    layer.norm.running_var.uniform_(0.5, 2)
    if affine:
        nn.init.normal_(layer.norm.weight)
        nn.init.normal_(layer.norm.bias)
    x = torch.randn(2, 3, 16, 16, dtype=torch.double, requires_grad=True)
    learned = [x, *layer.parameters()]
    results = []
    for f in (layer, lambda x: layer.norm(layer.conv(x)).clamp(min=0)):
        maps = {}

        def keep(tensor, maps=maps):
            if tensor.numel() >= 2 * 3 * 16 * 16:
                maps[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = f(x)
        results.append((out, torch.autograd.grad(out.square().sum(), learned), sum(maps.values())))
    (out, gradients, kept), (expected, expected_gradients, kept_by_both) = results
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients, expected_gradients)
    assert kept == 8 * 2 * (3 + 4) * 16 * 16  # the input and the output
    assert kept < kept_by_both


def test_conv_norm_without_running_statistics_uses_those_of_the_batch():
    layer = ConvNorm(3, 4, 3, norm_cfg=dict(BN, track_running_stats=False)).train()
    layer.norm.eval()
    out = layer(torch.randn(2, 3, 16, 16))
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)


def test_stem_has_no_relu_after_the_last_convolution():
    stem = Stem(3, 16, BN)
    out = stem(torch.randn(2, 3, 70, 33))
    assert out.shape == (2, 16, 5, 3)
    assert out.min() < 0
    inner = stem.conv[:3](torch.randn(2, 3, 70, 33))
    assert inner.min() == 0


def test_ffn_processes_each_pixel_separately():
    ffn = FFN(6, 24, BN).eval()
    x = torch.randn(1, 6, 4, 4)
    torch.testing.assert_close(ffn(x)[..., 1:2, 2:3], ffn(x[..., 1:2, 2:3]))


def test_patch_merging_halves_the_size_and_has_shortcuts():
    merge = PatchMerging(6, 10, BN).eval()
    assert merge(torch.randn(2, 6, 7, 4)).shape == (2, 10, 4, 2)
    for conv in (merge.dwconv1, merge.dwconv2):
        nn.init.zeros_(conv.norm.weight)
    x = torch.randn(2, 6, 7, 4)
    torch.testing.assert_close(merge(x), merge.conv(x))
