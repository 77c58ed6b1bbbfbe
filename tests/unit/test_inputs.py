"""Inputs of every size, dtype and memory layout return finite maps of the right shapes or raise a clear error."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from randomize import randomize
from torch import nn
from versions import HALF_ON_CPU

from mmevm.deployment import deploy
from mmevm.models import EfficientViM, FusionClsHead, UpsampleFPN

CONFIG = Path(__file__).parents[2] / 'configs/retinanet_evm_m1.py'
CHANNELS = (128, 192, 320)
WIDTH = 32  # channels of the pyramid
FORMS = ['backbone', 'deployed', 'pyramid', 'deployed pyramid']
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]

# The same examples in each run. Most are small, as large ones are slow; 16 and 32 pixels are edge cases.
every = settings(max_examples=25, deadline=None, derandomize=True, database=None)
sides = st.one_of(st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65]), st.integers(1, 100), st.integers(1, 300))


def build(form):
    torch.manual_seed(0)
    backbone = EfficientViM('m1')
    model = backbone if 'pyramid' not in form else nn.Sequential(backbone, UpsampleFPN(CHANNELS, WIDTH, num_outs=5))
    randomize(model).eval()
    if 'deployed' in form:
        backbone.switch_to_deploy()
    return model


@pytest.fixture(scope='module')
def models():
    """Each form of the network in each dtype."""
    return {(form, dtype): build(form).to(dtype) for form in FORMS for dtype in DTYPES}


def shapes(form, batch, height, width):
    """Return the expected shapes: ceil(H/s) × ceil(W/s) at stride s, doubled by each upsampling."""
    sizes = [(math.ceil(height / s), math.ceil(width / s)) for s in (16, 32, 64)]
    if 'pyramid' not in form:
        return [(batch, c, *size) for c, size in zip(CHANNELS, sizes, strict=True)]
    (h, w), *_ = sizes
    return [(batch, WIDTH, *size) for size in [(4 * h, 4 * w), (2 * h, 2 * w), *sizes]]


@torch.no_grad()
def check(models, form, dtype, x):
    if dtype == torch.float16 and not HALF_ON_CPU:
        reject()
    # On CPUs with AMX, the bfloat16 convolution of torch 2.14 with stride 2 reads uninitialized memory for such images.
    if dtype == torch.bfloat16 and x.shape[3] < 3:
        reject()
    outs = models[form, dtype](x)
    assert [tuple(out.shape) for out in outs] == shapes(form, len(x), *x.shape[2:])
    assert {out.dtype for out in outs} == {dtype}
    assert all(out.isfinite().all() for out in outs)
    return outs


@every
@given(st.sampled_from(FORMS), sides, sides, st.integers(0, 3), st.sampled_from(DTYPES))
@example('deployed', 700, 700, 2, torch.float32)
@example('pyramid', 700, 1, 1, torch.float32)
@example('deployed pyramid', 1, 699, 3, torch.bfloat16)
def test_every_size_batch_and_dtype(models, form, height, width, batch, dtype):
    check(models, form, dtype, torch.randn(batch, 3, height, width).to(dtype))


LAYOUTS = {
    'channels_last': lambda x: x.to(memory_format=torch.channels_last),
    'transposed': lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    'channels behind': lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    'every other pixel': lambda x: x.repeat_interleave(2, 2).repeat_interleave(3, 3)[:, :, ::2, ::3],
    'reversed channels': lambda x: x.flip(1).contiguous().flip(1),
    'a crop': lambda x: nn.functional.pad(x, (3, 2, 1, 4), value=float('nan'))[:, :, 1:-4, 3:-2],
    'one image, expanded': lambda x: x[:1].expand(len(x), -1, -1, -1),
    'one channel, expanded': lambda x: x[:, :1].expand(-1, 3, -1, -1),
    'one pixel, expanded': lambda x: x[:, :, :1, :1].expand(-1, -1, *x.shape[2:]),
}


@every
@given(st.sampled_from(FORMS), st.sampled_from(sorted(LAYOUTS)), sides, sides, st.integers(1, 3))
def test_memory_layout_does_not_affect_the_outputs(models, form, layout, height, width, batch):
    x = LAYOUTS[layout](torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0)))
    before = x.clone()
    outs = check(models, form, torch.float32, x)
    assert x.equal(before)  # the input is not changed in place
    expected = check(models, form, torch.float32, x.clone(memory_format=torch.contiguous_format))
    for out, reference in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, reference, rtol=0, atol=1e-5 * reference.abs().max().item())


VALUES = {
    'zeros': torch.zeros_like,
    'ones': torch.ones_like,
    'large': lambda x: 1e4 * torch.sign(x),
    'all of them large': lambda x: torch.full_like(x, 1e4),
    'large and negative': lambda x: torch.full_like(x, -1e4),
    'small': lambda x: 1e-7 * x,
    'a single pixel': lambda x: torch.zeros_like(x).index_fill(3, torch.tensor([0]), 1e4),
}


@every
@given(st.sampled_from(FORMS), st.sampled_from(sorted(VALUES)), sides, sides, st.sampled_from(DTYPES))
@example('backbone', 'all of them large', 64, 64, torch.float16)
@example('deployed', 'all of them large', 64, 64, torch.float16)
def test_finite_images_return_finite_maps(models, form, values, height, width, dtype):
    """Also in float16, whose largest number is 65504. Normalized images of ImageNet are below 3."""
    x = VALUES[values](torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0)))
    check(models, form, dtype, x.to(dtype))


@every
@given(
    st.sampled_from(FORMS),
    st.sampled_from([float('nan'), float('inf'), -float('inf')]),
    st.integers(0, 2),
    st.booleans(),
    sides,
    sides,
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_non_finite_image_does_not_affect_others(models, form, bad, image, whole, height, width, dtype):
    """The outputs of the other images are equal bit for bit."""
    x = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = check(models, form, dtype, x)
    spoilt = x.clone()
    if whole:
        spoilt[image] = bad
    else:
        spoilt[image, 1, -1, -1] = bad
    others = [i for i in range(3) if i != image]
    with torch.no_grad():
        outs = models[form, dtype](spoilt)
    for out, reference in zip(outs, expected, strict=True):
        assert out[others].equal(reference[others])
    assert not outs[2][image].isfinite().all()  # and its own outputs show it


@pytest.mark.parametrize('deployed', [False, True])
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_non_finite_image_does_not_affect_others_in_a_classifier(bad, deployed):
    backbone = EfficientViM('m1', out_indices=(2,), out_hidden_states=True)
    model = randomize(nn.Sequential(backbone, FusionClsHead(10, backbone.out_channels))).eval()
    if deployed:
        deploy(model)
    x = torch.randn(3, 3, 64, 48)
    spoilt = x.clone()
    spoilt[1, 0, 5, 7] = bad
    with torch.no_grad():
        logits, expected = model(spoilt), model(x)
    assert logits[[0, 2]].equal(expected[[0, 2]])
    assert logits[1].isnan().all()
    assert model(torch.zeros(0, 3, 64, 48)).shape == (0, 10)


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_non_finite_image_does_not_affect_others_in_a_detector(bad):
    """Only in one-stage detectors: mmdet's RoI extractor adds ``feats.sum() * 0`` of all images to each RoI."""
    cfg = Config.fromfile(CONFIG)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    model = randomize(MODELS.build(cfg.model)).eval()
    x = torch.randn(3, 3, 96, 64)
    spoilt = x.clone()
    spoilt[1, 0, 5, 7] = bad

    @torch.no_grad()
    def detect(images):
        shape = tuple(images.shape[2:])
        meta = dict(img_shape=shape, ori_shape=shape, batch_input_shape=shape, scale_factor=(1, 1))
        return [x.pred_instances for x in model.predict(images, [DetDataSample(metainfo=meta) for _ in images])]

    found, expected = detect(spoilt), detect(x)
    for i in (0, 2):
        assert len(found[i]) > 0
        assert all(found[i][key].equal(expected[i][key]) for key in ('bboxes', 'scores', 'labels'))
    assert len(found[1]) == 0
    assert detect(x[:0]) == []


WRONG = [
    (torch.zeros(3, 64, 64), r'\(B, 3, H, W\) with at least one pixel, not \(3, 64, 64\)'),
    (torch.zeros(1, 1, 3, 64, 64), r'not \(1, 1, 3, 64, 64\)'),
    (torch.zeros(1, 4, 64, 64), r'\(B, 3, H, W\) .* not \(1, 4, 64, 64\)'),
    (torch.zeros(1, 1, 64, 64), r'\(B, 3, H, W\) .* not \(1, 1, 64, 64\)'),
    (torch.zeros(1, 64, 64, 3), r'\(B, 3, H, W\) .* not \(1, 64, 64, 3\)'),
    (torch.zeros(1, 3, 0, 64), r'with at least one pixel, not \(1, 3, 0, 64\)'),
    (torch.zeros(1, 3, 64, 0), r'with at least one pixel, not \(1, 3, 64, 0\)'),
    (torch.zeros(()), r'not \(\)'),
    (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), r'of torch.float32 as its weights are, not of torch.uint8'),
    (torch.zeros(1, 3, 64, 64, dtype=torch.int64), r'not of torch.int64: convert them by x.to\(torch.float32\)'),
    (torch.zeros(1, 3, 64, 64, dtype=torch.bool), 'not of torch.bool'),
    (torch.zeros(1, 3, 64, 64, dtype=torch.complex64), 'not of torch.complex64'),
    (torch.zeros(1, 3, 64, 64, dtype=torch.float64), 'of torch.float32 as its weights are, not of torch.float64'),
    (torch.zeros(1, 3, 64, 64, dtype=torch.float16), 'of torch.float32 as its weights are, not of torch.float16'),
    ([torch.zeros(3, 64, 64)], 'not a list: torch.stack joins images of one size'),
    (None, 'not a NoneType'),
]


@pytest.mark.parametrize(('x', 'message'), WRONG)
@pytest.mark.parametrize('form', FORMS)
def test_invalid_input_raises(models, form, x, message):
    with pytest.raises(ValueError, match=f'^EfficientViM takes a tensor of images .*{message}'):
        models[form, torch.float32](x)


@pytest.mark.parametrize('form', FORMS)
def test_error_names_the_dtype_of_the_weights(models, form):
    with pytest.raises(ValueError, match=r'of torch.float16 as its weights are, not of torch.float32: .*torch.float16'):
        models[form, torch.float16](torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])  # autocast does not convert float64
def test_autocast_accepts_other_float_dtypes_but_not_integers(models, form, dtype):
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        outs = models[form, torch.float32](torch.randn(1, 3, 64, 64).to(dtype))
        assert all(out.isfinite().all() for out in outs)
        with pytest.raises(ValueError, match=r'not of torch\.uint8'):
            models[form, torch.float32](torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
