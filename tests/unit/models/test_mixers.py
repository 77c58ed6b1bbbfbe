import pytest
import torch
import torch.nn.functional as F
from versions import needs_half

from mmevm.models.mixers import HSMSSD


def algorithm_1(mixer, x):
    """The paper's Algorithm 1 with explicit loops over images, tokens and states, including ``A``."""
    outs, states = [], []
    for image in x:  # (D, H, W)
        channels, height, width = image.shape
        tokens = image.reshape(channels, -1).T  # (L, D)
        bcdt = tokens @ mixer.BCdt_proj.conv.weight[..., 0].T  # (L, 3N)
        bcdt = F.conv2d(bcdt.T.reshape(1, -1, height, width), mixer.dw.conv.weight, padding=1, groups=bcdt.shape[1])
        b, c, dt = bcdt.reshape(3, mixer.state_dim, -1)  # (N, L) each
        hidden = []
        for n in range(mixer.state_dim):
            importance = (dt[n] + mixer.A[n]).exp()
            importance = importance / importance.sum()
            hidden.append(sum(importance[i] * b[n, i] * tokens[i] for i in range(len(tokens))))
        mixed = []
        for h_in in hidden:
            h, z = (mixer.hz_proj.conv.weight[..., 0] @ h_in).chunk(2)
            mixed.append(mixer.out_proj.conv.weight[..., 0] @ (h * z * z.sigmoid() + h * mixer.D))
        h = torch.stack(mixed, dim=1)  # (D, N)
        outs.append(torch.stack([h @ c[:, i] for i in range(len(tokens))], dim=1).reshape(channels, height, width))
        states.append(h)
    return torch.stack(outs), torch.stack(states)


@pytest.mark.parametrize('ssd_expand', [1.0, 0.5, 2.0, 0.25])  # 0.25 of 6 channels are one
@pytest.mark.parametrize('size', [(4, 5), (1, 1), (1, 7)])
def test_agrees_with_algorithm_1(ssd_expand, size):
    mixer = HSMSSD(6, 4, ssd_expand).double()
    mixer.D.data.fill_(0.7)
    x = torch.randn(2, 6, *size, dtype=torch.double)
    torch.testing.assert_close(mixer(x), algorithm_1(mixer, x))


def test_gradients():
    mixer = HSMSSD(4, 3).double()
    assert torch.autograd.gradcheck(mixer, torch.randn(1, 4, 3, 2, dtype=torch.double, requires_grad=True))


def test_A_is_loaded_and_does_not_affect_the_output():
    mixer, other = HSMSSD(6, 4), HSMSSD(6, 4)
    state = mixer.state_dict()
    assert state['A'].shape == (4,)
    other.load_state_dict(dict(state, A=state['A'] + 5))
    x = torch.randn(1, 6, 3, 3)
    torch.testing.assert_close(other(x), mixer(x))
    assert torch.equal(other.A, mixer.A + 5)


def test_A_starts_uniform_from_1_to_16():
    values = HSMSSD(1, 10000).A
    assert 1 <= values.min() < 1.1
    assert 15.9 < values.max() <= 16
    assert abs(values.mean() - 8.5) < 0.2


@pytest.mark.parametrize('dtype', [pytest.param(torch.float16, marks=needs_half), torch.bfloat16])
def test_many_tokens_in_half_precision(dtype):
    """An importance of 1/3000000 is 5.6 times float16's smallest number: rounded to 6, they would sum to 1.07."""
    mixer = HSMSSD(4, 2).eval()
    for parameter in (mixer.BCdt_proj.conv.weight, mixer.dw.conv.weight):
        parameter.data.abs_()  # sums in which nothing cancels
    mixer.dw.conv.weight.data[-2:] = 0  # of dt: all tokens are equally important
    x = 1 + 0.3 * torch.randn(1, 4, 1000, 3000)
    y, h = mixer(x)
    half_y, half_h = mixer.to(dtype)(x.to(dtype))
    assert half_y.dtype == half_h.dtype == dtype
    torch.testing.assert_close(half_h.float(), h, rtol=0, atol=0.03 * h.abs().max().item())
    torch.testing.assert_close(half_y.float(), y, rtol=0, atol=0.05 * y.abs().max().item())
