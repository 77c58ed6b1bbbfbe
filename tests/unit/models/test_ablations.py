"""The mixers of Table C agree with their formulas, with each other and with PyTorch's attention."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from versions import needs_half

from mmevm.models import HSMSSD, NCSSD, EfficientViM, MultiHeadHSMSSD, SelfAttention
from mmevm.registry import MODELS

ABLATIONS = [MultiHeadHSMSSD, NCSSD, SelfAttention]
TINY = dict(embed_dims=(16, 24, 32), depths=(1, 1, 1), state_dims=(9, 4, 4))
SIZES = [(4, 5), (1, 1), (1, 7)]

every_mixer = pytest.mark.parametrize('mixer_type', [HSMSSD, *ABLATIONS])
every_ablation = pytest.mark.parametrize('mixer_type', ABLATIONS)


def build(mixer_type, channels, state_dim, head_dim=None):
    return mixer_type(channels, state_dim, **({} if mixer_type is HSMSSD else dict(head_dim=head_dim)))


def depthwise(tokens, weight, size):
    """3×3 convolution of each channel of (C, L), as a map of this size."""
    return F.conv2d(tokens.reshape(1, -1, *size), weight, padding=1, groups=len(tokens)).reshape(tokens.shape)


def head_of(channel, head_dim):
    return 0 if head_dim is None else channel // head_dim


def importances(dt):
    """Softmax over the tokens of (heads, L)."""
    return torch.stack([row.exp() / sum(value.exp() for value in row) for row in dt])


def multi_head_hsm_ssd(mixer, image, state_dim, head_dim):
    tokens = image.flatten(1)  # (D, L)
    bcdt = depthwise(mixer.BCdt_proj.conv.weight[..., 0] @ tokens, mixer.dw.conv.weight, image.shape[1:])
    b, c, a = bcdt[:state_dim], bcdt[state_dim : 2 * state_dim], importances(bcdt[2 * state_dim :])
    states = []
    for n in range(state_dim):
        h_in = torch.stack(
            [
                sum(a[head_of(d, head_dim), i] * b[n, i] * channel[i] for i in range(len(channel)))
                for d, channel in enumerate(tokens)
            ]
        )
        h, z = (mixer.hz_proj.conv.weight[..., 0] @ h_in).chunk(2)
        states.append(mixer.out_proj.conv.weight[..., 0] @ (h * z * z.sigmoid() + h * mixer.D))
    h = torch.stack(states, dim=1)  # (D, N)
    return torch.stack([h @ c[:, i] for i in range(tokens.shape[1])], dim=1).view_as(image), h


def nc_ssd(mixer, image, state_dim, head_dim):
    tokens = image.flatten(1)  # (D, L)
    channels = len(tokens)
    weight = mixer.BCxdtz_proj.conv.weight[..., 0, 0]
    bcx = depthwise(weight[: 2 * state_dim + channels] @ tokens, mixer.dw.conv.weight, image.shape[1:])
    b, c, x = bcx[:state_dim], bcx[state_dim : 2 * state_dim], bcx[2 * state_dim :]
    a = importances(weight[2 * state_dim + channels : -channels] @ tokens)
    z = weight[-channels:] @ tokens
    h = torch.zeros(channels, state_dim, dtype=x.dtype)
    for i in range(tokens.shape[1]):
        for d in range(channels):
            h[d] += a[head_of(d, head_dim), i] * b[:, i] * x[d, i]
    outs = []
    for i in range(tokens.shape[1]):
        y = h @ c[:, i]
        outs.append(mixer.out_proj.conv.weight[..., 0, 0] @ (y * z[:, i] * z[:, i].sigmoid() + y * mixer.D))
    return torch.stack(outs, dim=1).view_as(image), h


def self_attention(mixer, image, state_dim, head_dim):
    tokens = image.flatten(1)  # (D, L)
    channels = len(tokens)
    q, k, v = (mixer.qkv_proj.conv.weight[..., 0, 0] @ tokens).chunk(3)
    outs = []
    for i in range(tokens.shape[1]):
        y = torch.zeros(channels, dtype=image.dtype)
        for head in range(head_of(channels - 1, head_dim) + 1):
            of_head = [d for d in range(channels) if head_of(d, head_dim) == head]
            scores = torch.stack([q[of_head, i] @ k[of_head, j] for j in range(tokens.shape[1])])
            y[of_head] = v[of_head] @ importances(scores[None] / len(of_head) ** 0.5)[0]
        outs.append(mixer.out_proj.conv.weight[..., 0, 0] @ y)
    return torch.stack(outs, dim=1).view_as(image), None


class TestFormulas:
    @pytest.mark.parametrize('size', SIZES)
    @pytest.mark.parametrize('head_dim', [2, None])
    @pytest.mark.parametrize(
        ('mixer_type', 'formula'),
        [(MultiHeadHSMSSD, multi_head_hsm_ssd), (NCSSD, nc_ssd), (SelfAttention, self_attention)],
    )
    @torch.no_grad()
    def test_agrees_with_its_formula(self, mixer_type, formula, head_dim, size):
        mixer = mixer_type(6, 4, head_dim=head_dim).double()
        if hasattr(mixer, 'D'):
            mixer.D.fill_(0.7)
        x = torch.randn(2, 6, *size, dtype=torch.double)
        y, h = mixer(x)
        for i, image in enumerate(x):
            expected_y, expected_h = formula(mixer, image, 4, head_dim)
            torch.testing.assert_close(y[i], expected_y)
            torch.testing.assert_close(None if h is None else h[i], expected_h)

    def test_ssd_expand(self):
        x = torch.randn(1, 6, 3, 5, dtype=torch.double)
        for ssd_expand in (0.5, 2.0):
            mixer = MultiHeadHSMSSD(6, 4, ssd_expand, head_dim=3).double()
            assert mixer.out_proj.conv.in_channels == 6 * ssd_expand
            torch.testing.assert_close(mixer(x)[0][0], multi_head_hsm_ssd(mixer, x[0], 4, 3)[0])

    @every_ablation
    def test_gradients(self, mixer_type):
        mixer = mixer_type(4, 3, head_dim=2).double()
        x = torch.randn(1, 4, 3, 2, dtype=torch.double, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: [out for out in mixer(x) if out is not None], x)

    @pytest.mark.parametrize('mixer_type', [MultiHeadHSMSSD, NCSSD])
    @pytest.mark.parametrize('head_dim', [2, None])
    @torch.no_grad()
    def test_importances_of_each_head_sum_to_one(self, mixer_type, head_dim):
        """With B = 1 and one channel of each head = 1, the hidden states are the sums of the importances."""
        channels, states = 6, 3
        ones = torch.arange(0, channels, head_dim or channels)
        mixer = mixer_type(channels, states, head_dim=head_dim)
        proj = mixer.BCdt_proj if mixer_type is MultiHeadHSMSSD else mixer.BCxdtz_proj
        proj.conv.weight[:states] = 0
        proj.conv.weight[:states, 0] = 1  # B is channel 0
        identity_kernel(mixer.dw)
        if mixer_type is MultiHeadHSMSSD:  # nothing is mixed: h·(SiLU(0) + D) = h
            mixer.hz_proj.conv.weight.copy_(torch.eye(2 * channels, channels)[..., None])
            mixer.out_proj.conv.weight.copy_(torch.eye(channels)[..., None])
        else:
            proj.conv.weight[2 * states : 2 * states + channels] = torch.eye(channels)[..., None, None]
        x = 3 * torch.randn(2, channels, 5, 3)
        x[:, ones] = 1
        sums = mixer(x)[1][:, ones]
        torch.testing.assert_close(sums, torch.ones_like(sums))


class TestAgainstEachOther:
    @torch.no_grad()
    def test_single_head_equals_hsm_ssd_with_equal_importances(self):
        shared, per_state = MultiHeadHSMSSD(6, 4, head_dim=None), HSMSSD(6, 4)
        weights = shared.state_dict()
        for key in ('BCdt_proj.conv.weight', 'dw.conv.weight'):  # rows of B, C and dt
            weights[key] = torch.cat([weights[key], weights[key][-1:].expand(3, *weights[key].shape[1:])])
        per_state.load_state_dict(dict(weights, A=per_state.A))
        x = torch.randn(2, 6, 3, 5)
        torch.testing.assert_close(shared(x), per_state(x))
        per_state.dw.conv.weight[-1] += 1
        assert not torch.allclose(shared(x)[0], per_state(x)[0], rtol=1e-2)

    @pytest.mark.parametrize('head_dim', [2, None])
    @torch.no_grad()
    def test_heads_of_equal_importance_equal_a_single_head(self, head_dim):
        """(E) and (F) differ in the importance only."""
        heads, single = MultiHeadHSMSSD(6, 4, head_dim=head_dim), MultiHeadHSMSSD(6, 4, head_dim=None)
        weights = heads.state_dict()
        for key in ('BCdt_proj.conv.weight', 'dw.conv.weight'):
            weights[key][9:] = weights[key][8]
        heads.load_state_dict(weights)
        single.load_state_dict(
            {k: w[:9] if k in ('BCdt_proj.conv.weight', 'dw.conv.weight') else w for k, w in weights.items()}
        )
        x = torch.randn(2, 6, 3, 5)
        torch.testing.assert_close(heads(x), single(x))

    @pytest.mark.parametrize('head_dim', [1, 2, None])
    @torch.no_grad()
    def test_attention_equals_pytorch(self, head_dim):
        mixer = SelfAttention(6, 4, head_dim=head_dim)
        reference = nn.MultiheadAttention(6, 6 // (head_dim or 6), bias=False, batch_first=True)
        reference.in_proj_weight.copy_(mixer.qkv_proj.conv.weight[..., 0, 0])
        reference.out_proj.weight.copy_(mixer.out_proj.conv.weight[..., 0, 0])
        x = torch.randn(2, 6, 3, 5)
        tokens = x.flatten(2).transpose(1, 2)  # (B, L, D)
        expected = reference(tokens, tokens, tokens)[0].transpose(1, 2).view_as(x)
        torch.testing.assert_close(mixer(x)[0], expected)


def identity_kernel(dw):
    dw.conv.weight.zero_()
    dw.conv.weight[..., 1, 1] = 1


class TestProposition1:
    """HSM-SSD equals NC-SSD if N = L, a·1ᵀ ⊙ B is the identity and C is diagonal (paper, Sec. 3.1, Supplement G).

    The first L channels of a token are the one-hot of its position, so that projections without bias can give B and C
    the values that the proposition asks for: with dt = 0 an importance is 1/L, and B is L times the one-hot.
    """

    size, channels = (2, 3), 10
    tokens = 6

    @torch.no_grad()
    def pair(self, head_dim):
        number, channels = self.tokens, self.channels
        hsm, nc = HSMSSD(channels, number), NCSSD(channels, number, head_dim=head_dim)
        for proj in (hsm.BCdt_proj.conv.weight, nc.BCxdtz_proj.conv.weight):
            proj.zero_()
        b_and_c = torch.cat(
            [number * torch.eye(number, channels), torch.randn(number, 1) * torch.eye(number, channels)]
        )
        hsm.BCdt_proj.conv.weight[: 2 * number, :, 0] = b_and_c
        nc.BCxdtz_proj.conv.weight[: 2 * number, :, 0, 0] = b_and_c
        identity_kernel(hsm.dw)
        identity_kernel(nc.dw)
        w_in, w_z = hsm.hz_proj.conv.weight[..., None].chunk(2)
        nc.BCxdtz_proj.conv.weight[2 * number : 2 * number + channels] = w_in
        nc.BCxdtz_proj.conv.weight[-channels:] = w_z
        nc.out_proj.conv.weight.copy_(hsm.out_proj.conv.weight[..., None])
        hsm.D.fill_(0.7)
        nc.D.fill_(0.7)
        return hsm, nc

    def image(self):
        x = torch.randn(2, self.channels, self.tokens)
        x[:, : self.tokens] = torch.eye(self.tokens)
        return x.unflatten(2, self.size)

    @pytest.mark.parametrize('head_dim', [5, None])
    @torch.no_grad()
    def test_proposition_1_holds(self, head_dim):
        hsm, nc = self.pair(head_dim)
        x = self.image()
        (y, _), (expected, _) = hsm(x), nc(x)
        assert expected.abs().mean() > 0.01
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize('assumption', ['a1ᵀ ⊙ B = I', 'C is diagonal', 'no depthwise convolution of x'])
    @torch.no_grad()
    def test_proposition_1_needs_each_assumption(self, assumption):
        hsm, nc = self.pair(None)
        number, channels = self.tokens, self.channels
        if assumption == 'no depthwise convolution of x':
            nc.dw.conv.weight[2 * number :] = torch.randn(channels, 1, 3, 3)
        else:
            rows = slice(0, number) if 'B' in assumption else slice(number, 2 * number)
            weight = torch.randn(number, channels)
            hsm.BCdt_proj.conv.weight[rows, :, 0] = weight
            nc.BCxdtz_proj.conv.weight[rows, :, 0, 0] = weight
        x = self.image()
        (y, _), (other, _) = hsm(x), nc(x)
        assert (y - other).abs().max() > 0.1 * other.abs().max()


class TestEveryMixer:
    @every_mixer
    @pytest.mark.parametrize('size', SIZES)
    def test_shapes(self, mixer_type, size):
        y, h = build(mixer_type, 8, 3, head_dim=4)(torch.randn(2, 8, *size))
        assert y.shape == (2, 8, *size)
        assert (h is None) if mixer_type is SelfAttention else (h.shape == (2, 8, 3))

    @every_mixer
    def test_every_parameter_except_A_gets_a_gradient(self, mixer_type):
        mixer = build(mixer_type, 8, 3, head_dim=4)
        mixer(torch.randn(2, 8, 3, 5))[0].square().sum().backward()
        for name, parameter in mixer.named_parameters():
            assert parameter.requires_grad != (name == 'A')
            if name != 'A':
                assert parameter.grad.isfinite().all(), name
                assert parameter.grad.flatten(1).any(1).all() if parameter.ndim > 1 else parameter.grad.any(), name

    @every_mixer
    @torch.no_grad()
    def test_images_of_a_batch_are_independent(self, mixer_type):
        mixer = build(mixer_type, 8, 3, head_dim=4)
        x = torch.randn(3, 8, 3, 5)
        order = [2, 0, 1]
        for out, reordered in zip(mixer(x), mixer(x[order]), strict=True):
            if out is not None:
                torch.testing.assert_close(reordered, out[order])
                torch.testing.assert_close(mixer(x[1:2])[0], mixer(x)[0][1:2])

    @every_mixer
    @torch.no_grad()
    def test_every_token_depends_on_every_other(self, mixer_type):
        mixer = build(mixer_type, 8, 3, head_dim=4).double()
        x = torch.randn(1, 8, 7, 5, dtype=torch.double)
        changed = x.clone()
        changed[..., 0, 0] += 1
        assert (mixer(changed)[0] != mixer(x)[0]).any(1).all()

    @every_mixer
    @pytest.mark.parametrize('head_dim', [4, None])
    def test_autocast_in_bfloat16(self, mixer_type, head_dim):
        mixer = build(mixer_type, 8, 3, head_dim)
        x = torch.randn(2, 8, 9, 7)
        expected, _ = mixer(x)
        with torch.autocast('cpu', torch.bfloat16):
            y, _ = mixer(x)
        y.float().square().sum().backward()
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
        assert all(p.grad.isfinite().all() for p in mixer.parameters() if p.requires_grad)

    @pytest.mark.parametrize(
        ('mixer_type', 'proj', 'dt'),
        [(MultiHeadHSMSSD, 'BCdt_proj', slice(4, 6)), (NCSSD, 'BCxdtz_proj', slice(8, 10))],
    )
    @pytest.mark.parametrize(
        ('dtype', 'size'),
        [pytest.param(torch.float16, (1000, 3000), marks=needs_half), (torch.bfloat16, (100, 300))],
    )
    @torch.no_grad()
    def test_many_tokens_in_half_precision(self, mixer_type, proj, dt, dtype, size):
        """An importance of 1/3000000 is 5.6 times float16's smallest number: rounded to 6, they would sum to 1.07."""
        mixer = mixer_type(4, 2, head_dim=2)
        weight = getattr(mixer, proj).conv.weight
        for parameter in (weight, mixer.dw.conv.weight):
            parameter.abs_()  # sums in which nothing cancels
        weight[dt] = 0  # all tokens are equally important
        x = 1 + 0.3 * torch.randn(1, 4, *size)
        y, h = mixer(x)
        half_y, half_h = mixer.to(dtype)(x.to(dtype))
        assert half_y.dtype == half_h.dtype == dtype
        torch.testing.assert_close(half_h.float(), h, rtol=0, atol=0.03 * h.abs().max().item())
        torch.testing.assert_close(half_y.float(), y, rtol=0, atol=0.05 * y.abs().max().item())


class TestArguments:
    @every_ablation
    @pytest.mark.parametrize('head_dim', [0, -2, 5, 16])
    def test_invalid_head_dim_raises(self, mixer_type, head_dim):
        with pytest.raises(ValueError, match=rf'head_dim={head_dim} .*give a divisor of 8, or None'):
            mixer_type(8, 3, head_dim=head_dim)

    def test_invalid_ssd_expand_raises(self):
        with pytest.raises(ValueError, match=r'ssd_expand=0\.1 of 8 channels leaves none'):
            MultiHeadHSMSSD(8, 3, ssd_expand=0.1, head_dim=4)

    @every_ablation
    def test_default_head_dim_is_32(self, mixer_type):
        weights = mixer_type(64, 3, head_dim=32).state_dict()
        mixer_type(64, 3).load_state_dict(weights)
        with pytest.raises(ValueError, match='head_dim=32'):
            mixer_type(48, 3)


class TestInTheBackbone:
    @every_ablation
    def test_built_by_config(self, mixer_type):
        cfg = dict(
            type='mmevm.EfficientViM', arch=TINY, mixer_cfg=dict(type=f'mmevm.{mixer_type.__name__}', head_dim=8)
        )
        model = MODELS.build(cfg)
        assert [type(stage.blocks[0].mixer) for stage in model.stages] == 3 * [mixer_type]
        outs = model(torch.randn(2, 3, 64, 96))
        assert [tuple(out.shape) for out in outs] == [(2, 16, 4, 6), (2, 24, 2, 3), (2, 32, 1, 2)]

    @pytest.mark.parametrize('mixer_type', [MultiHeadHSMSSD, NCSSD])
    def test_hidden_states_of_each_stage(self, mixer_type):
        mixer_cfg = dict(type=mixer_type.__name__, head_dim=8, _scope_='mmevm')
        model = EfficientViM(TINY, out_indices=(2,), out_hidden_states=True, mixer_cfg=mixer_cfg)
        outs = model(torch.randn(2, 3, 64, 96))
        assert [tuple(out.shape) for out in outs] == [(2, 16, 9), (2, 24, 4), (2, 32, 4), (2, 32, 1, 2)]

    def test_custom_mixer(self):
        class Pool(nn.Module):
            def __init__(self, channels, state_dim, kernel_size):
                super().__init__()
                self.pool = nn.AvgPool2d(kernel_size, 1, kernel_size // 2)

            def forward(self, x):
                return self.pool(x), None

        MODELS.register_module(module=Pool)
        try:
            model = EfficientViM(TINY, mixer_cfg=dict(type='mmevm.Pool', kernel_size=5))
        finally:
            MODELS.module_dict.pop('Pool')
        assert model.stages[2].blocks[0].mixer.pool.kernel_size == 5
        assert model(torch.randn(2, 3, 64, 96))[2].shape == (2, 32, 1, 2)

    def test_attention_has_no_hidden_states(self):
        mixer_cfg = dict(type='mmevm.SelfAttention', head_dim=8)
        model = EfficientViM(TINY, out_hidden_states=True, mixer_cfg=mixer_cfg)
        with pytest.raises(ValueError, match='SelfAttention has no hidden states: set out_hidden_states=False'):
            model(torch.randn(1, 3, 64, 64))


class PreNorm(nn.Module):
    """A residual block with any mixer, as in other networks."""

    def __init__(self, channels, mixer):
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.mixer = mixer

    def forward(self, x):
        return x + self.mixer(self.norm(x))[0]


@every_mixer
def test_mixers_train_in_another_network(mixer_type):
    """As in Table D, the mixers replace that of another network.

    Each token has to say what one marked token, anywhere on the map, holds. Two 3×3 convolutions would bring it to 25
    of the 42 tokens at most, which leaves a loss of 0.4.
    """
    channels = 16
    net = nn.Sequential(
        nn.Conv2d(2, channels, 1),
        *(PreNorm(channels, build(mixer_type, channels, 8, head_dim=8)) for _ in range(2)),
        nn.Conv2d(channels, 1, 1),
    )

    def loss(batch):
        value = torch.randn(batch, 1, 6, 7)
        mark = F.one_hot(torch.randint(42, (batch,)), 42).float().view_as(value)
        target = (value * mark).sum((2, 3), keepdim=True)
        return F.mse_loss(net(torch.cat([value, 5 * mark], 1)), target.expand_as(value))

    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        loss(32).backward()
        optimizer.step()
    with torch.no_grad():
        assert loss(1000) < 0.25
