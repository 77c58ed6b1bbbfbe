"""FLOPs of whole networks against the paper and timm, of small ones against formulas; uncounted operators."""

import dataclasses
import functools
from pathlib import Path

import mmengine
import pytest
import timm
import torch
import torchvision
from mmcv.ops import DeformConv2dPack, ModulatedDeformConv2dPack
from mmengine.config import Config
from mmengine.structures import InstanceData
from torch import nn
from torch.nn import functional as F

from mmevm.analysis import build_without_weights, default_input_size, measure_complexity
from mmevm.models import EfficientViM

CONFIGS = Path(__file__).parents[3] / 'configs'

# Input size, parameters (M) and MFLOPs of the paper; parameters of the models with distillation heads.
PAPER = {
    'efficientvim-m1_300e_in1k': (224, 6.679458, 238.93),
    'efficientvim-m2_300e_in1k': (224, 13.903842, 355.13),
    'efficientvim-m3_300e_in1k': (224, 16.604174, 656.04),
    'efficientvim-m4_300e_in1k': (256, 19.606505, 1111.93),
    'efficientvim-m4_ft30e_in1k-384px': (384, 19.606505, 2379.49),
    'efficientvim-m4_ft30e_in1k-512px': (512, 19.606505, 4154.08),
}
DISTILLED = {'m1': 7.643462, 'm2': 15.315846, 'm3': 18.176178, 'm4': 21.178509}


def read(name):
    return Config.fromfile(CONFIGS / f'{name}.py')


@functools.cache
def cost_of_classifier(name):
    """Return the complexity at the config's test size."""
    cfg = read(f'classification/{name}')
    complexity = measure_complexity(build_without_weights(cfg), (1, 3, *default_input_size(cfg)[0]))
    return dataclasses.replace(complexity, _analyzer=None)  # it keeps the model in memory


class Function(nn.Module):
    """A function of a tensor and of submodules."""

    def __init__(self, function, *parts):
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return self.function(x, *self.parts)


@pytest.mark.parametrize('name', PAPER)
def test_classifiers_have_the_flops_of_the_paper(name):
    size, params, mflops = PAPER[name]
    complexity = cost_of_classifier(name)
    assert complexity.input_shape == (1, 3, size, size)
    assert complexity.params == round(params * 1e6)
    assert complexity.flops / 1e6 == pytest.approx(mflops, rel=5e-3)
    # fvcore does not count the authors' LayerNorm, which consists of sums and products; ours is one operator
    assert (complexity.flops - complexity.by_operator['layer_norm']) / 1e6 == pytest.approx(mflops, rel=1e-4)
    assert not complexity.unknown
    assert not complexity.uncalled


@pytest.mark.parametrize('arch', DISTILLED)
def test_distilled_classifiers_have_the_flops_of_timm(arch):
    ours = cost_of_classifier(f'efficientvim-{arch}-distilled_300e_in1k')
    timms = measure_complexity(timm.create_model(f'efficientvim_{arch}_dist'), ours.input_shape)
    assert ours.params == timms.params == round(DISTILLED[arch] * 1e6)
    for operator in ('conv', 'batch_norm', 'layer_norm', 'linear', 'matmul'):
        assert ours.by_operator[operator] == timms.by_operator[operator], operator
    assert ours.flops == pytest.approx(timms.flops, rel=1e-4)  # they differ in how logits are summed


@pytest.mark.parametrize('name', [*PAPER, *(f'efficientvim-{arch}-distilled_300e_in1k' for arch in DISTILLED)])
def test_metafile_lists_parameters_and_flops(name):
    listed = mmengine.load(CONFIGS / 'classification' / 'metafile.yml')['Models']
    (costs,) = [model['Metadata'] for model in listed if model['Config'] == f'configs/classification/{name}.py']
    complexity = cost_of_classifier(name)
    assert (costs['Parameters'], costs['FLOPs']) == (complexity.params, complexity.flops)


FORMULAS = {
    'conv': (nn.Conv2d(4, 6, 3, 2, 1, groups=2), (2, 4, 8, 10), 2 * 6 * 4 * 5 * (4 // 2) * 9),
    'transposed conv': (nn.ConvTranspose2d(4, 6, 2, 2), (2, 4, 5, 7), 2 * 4 * 5 * 7 * 6 * 4),
    'linear': (nn.Linear(10, 3), (2, 4, 8, 10), 2 * 4 * 8 * 10 * 3),
    'batch norm': (nn.BatchNorm2d(4), (2, 4, 8, 10), 2 * 4 * 8 * 10 * 2),  # a scale and a shift
    'matrix product': (Function(lambda x: x @ x.transpose(2, 3)), (2, 4, 8, 10), 2 * 4 * 8 * 8 * 10),
    'einsum': (Function(lambda x: torch.einsum('bchw,bdhw->bcd', x, x)), (2, 4, 8, 10), 2 * 4 * 4 * 80),
    'attention': (
        Function(lambda x: F.scaled_dot_product_attention(x[:, :, :3], x, x[..., :7])),
        (2, 4, 8, 10),
        2 * 4 * 3 * 8 * (10 + 7),
    ),
    'multi-head attention': (
        Function(lambda x, attention: attention(*3 * [x.flatten(2)]), nn.MultiheadAttention(16, 4, batch_first=True)),
        (2, 5, 4, 4),
        4 * 2 * 5 * 16 * 16 + 2 * (2 * 5 * 5 * 16),  # four projections; queries by keys, weights by values
    ),
    'baddbmm': (
        Function(lambda x: torch.baddbmm(x[0, :, :, :1], x[0], x[0].transpose(1, 2))),
        (1, 4, 8, 10),
        4 * 8 * 8 * 10,
    ),
    'deformable conv of torchvision': (
        Function(
            lambda x: torchvision.ops.deform_conv2d(x, x.new_zeros(1, 18, 8, 10), x.new_ones(6, 4, 3, 3), padding=1)
        ),
        (1, 4, 8, 10),
        6 * 80 * 4 * 9,
    ),
    'deformable conv': (
        DeformConv2dPack(4, 6, 3, padding=1, groups=2),
        (1, 4, 8, 10),
        6 * 80 * 2 * 9 + 18 * 80 * 4 * 9,  # itself, and the conv of its offsets
    ),
    'modulated deformable conv': (
        ModulatedDeformConv2dPack(4, 6, 3, padding=1, bias=False),
        (1, 4, 8, 10),
        6 * 80 * 4 * 9 + 27 * 80 * 4 * 9,
    ),
}


@pytest.mark.parametrize('case', FORMULAS)
def test_operators_have_the_flops_of_their_formulas(case):
    module, shape, flops = FORMULAS[case]
    complexity = measure_complexity(module, shape)
    assert complexity.flops == flops
    assert not complexity.unknown


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x


def test_operators_without_a_rule_are_reported():
    model = Function(lambda x: Square.apply(torch.fft.fft2(x).real) + torch.cdist(x, x).sin().mean())
    complexity = measure_complexity(model, (1, 1, 8, 8))
    assert complexity.unknown == {'fft_fft2': 1, 'prim::PythonOp.Square': 1, 'cdist': 1}
    assert complexity.elementwise == {'real': 1, 'add': 1, 'sin': 1, 'mean': 1}
    assert complexity.flops == 0


def test_modules_sum_to_the_whole_network():
    model = EfficientViM('m1')
    complexity = measure_complexity(model, (1, 3, 64, 96))
    assert complexity.by_module[''] == (complexity.params, complexity.flops)
    assert complexity.params == sum(p.numel() for p in model.parameters())
    assert complexity.flops == sum(complexity.by_operator.values())
    assert set(complexity.by_module) == {name for name, _ in model.named_modules()}
    parts = [complexity.by_module[name] for name in ('patch_embed', 'stages')]
    assert tuple(map(sum, zip(*parts, strict=True))) == complexity.by_module['']
    assert complexity.by_module['patch_embed.conv.0.conv'] == (3 * 16 * 9, 3 * 16 * 9 * 32 * 48)


def test_maps_of_the_stem_cost_nothing():
    arch = dict(embed_dims=(16, 24), depths=(1, 1), state_dims=(4, 4))
    counts = [
        measure_complexity(EfficientViM(arch, **outputs), (1, 3, 64, 64)).by_module
        for outputs in (dict(out_indices=(0, 1)), dict(out_strides=(2, 4, 8, 16, 32)))
    ]
    assert counts[0] == counts[1]


def test_flops_are_proportional_to_the_batch_size():
    one, three = (measure_complexity(EfficientViM('m1'), (batch, 3, 64, 64)) for batch in (1, 3))
    assert three.flops == 3 * one.flops
    assert three.input_shape == (3, 3, 64, 64)


def test_table_lists_the_requested_levels():
    complexity = measure_complexity(EfficientViM('m1'), (1, 3, 64, 64))
    assert 'patch_embed' not in complexity.table(0)
    assert 'stages.1' not in complexity.table(1)
    assert 'stages.1' in complexity.table(2)
    assert '5.714M' in complexity.table(0)


def fused_attention_is_allowed():
    return not hasattr(torch.backends, 'mha') or torch.backends.mha.get_fastpath_enabled()


def test_the_model_is_not_changed():
    model = EfficientViM('m1', frozen_stages=1, norm_eval=True, with_cp=True, drop_path_rate=0.5).train()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    rng = torch.get_rng_state()
    measure_complexity(model, (2, 3, 64, 64))
    assert [module.training for module in model.modules()] == modes
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert fused_attention_is_allowed()


def test_the_model_is_not_changed_by_a_failing_pass():
    model = EfficientViM('m1').train()
    with pytest.raises(RuntimeError):
        measure_complexity(model, (1, 4, 64, 64))
    assert all(module.training for module in model.modules())
    assert fused_attention_is_allowed()


class PartlyUsed(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.by_parent = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(self.used(x), self.by_parent.weight)


def test_uncalled_modules_are_reported():
    complexity = measure_complexity(PartlyUsed(), torch.rand(1, 4))
    assert complexity.uncalled == ('unused', 'by_parent')
    assert complexity.params == 3 * 20
    assert complexity.flops == 2 * 16
    assert complexity.by_module['by_parent'] == (20, 0)


def test_outputs_of_any_structure_are_counted():
    def forward(x, linear):
        return dict(a=[InstanceData(scores=linear(x))], b=(linear(x), None, 1))

    assert measure_complexity(Function(forward, nn.Linear(4, 4)), torch.rand(1, 4)).flops == 2 * 16


def test_a_model_without_tensor_outputs_is_refused():
    with pytest.raises(ValueError, match='returns no tensor'):
        measure_complexity(Function(lambda x: 'text'), (1, 3, 8, 8))


@pytest.mark.parametrize('shape', [(224, 224), (1, 3, 0, 8), (1, 3, -8, 8), (1, 1, 3, 8, 8)])
def test_an_invalid_shape_is_refused(shape):
    with pytest.raises(ValueError, match='B, C, H, W'):
        measure_complexity(nn.Identity(), shape)


def test_one_stage_detectors_include_neck_and_head():
    model = build_without_weights(read('retinanet_evm_m1'))
    complexity = measure_complexity(model, (1, 3, 128, 192))
    backbone = measure_complexity(model.backbone, (1, 3, 128, 192))
    assert complexity.by_module['backbone'] == backbone.by_module['']
    pixels = sum((128 // stride) * (192 // stride) for stride in (8, 16, 32, 64)) + 1 * 2
    of_each = 9 * 256 * (8 * 256 + 9 * 80 + 9 * 4)  # two towers of four convs, scores and boxes of 9 anchors
    assert complexity.by_module['bbox_head'][1] == pixels * of_each
    parts = [complexity.by_module[name][1] for name in ('backbone', 'neck', 'bbox_head')]
    assert sum(parts) == complexity.flops
    assert all(parts)
    assert not complexity.rois


def test_two_stage_detectors_report_their_rois():
    model = build_without_weights(read('maskrcnn_evm_m1'))
    complexity = measure_complexity(model, (1, 3, 128, 192))
    boxes = complexity.rois['roi_head.bbox_roi_extractor']
    masks = complexity.rois['roi_head.mask_roi_extractor']
    assert masks == min(boxes, 100)
    assert 100 < boxes <= 1000
    of_a_box = 256 * 49 * 1024 + 1024 * 1024 + 1024 * (81 + 4 * 80)
    of_a_mask = 14 * 14 * (4 * 9 * 256 * 256 + 4 * 256 * 256) + 28 * 28 * 256 * 80
    assert complexity.by_module['roi_head.bbox_head'][1] == boxes * of_a_box
    assert complexity.by_module['roi_head.mask_head'][1] == masks * of_a_mask
    assert set(complexity.unknown) == {'prim::PythonOp.NMSop', 'prim::PythonOp.RoIAlignFunction'}
