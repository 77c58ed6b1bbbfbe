"""Exported ONNX files agree with PyTorch in ONNX Runtime and OpenVINO; a file that does not agree is not written."""

import copy
import itertools
import re
import sys
from collections import Counter

import pytest
import torch
from command_line import ROOT, run_here, succeed
from mmengine.config import Config
from randomize import randomize
from torch import nn
from versions import EXPORTS_ONNX

from mmevm import __version__
from mmevm.analysis import build_without_weights
from mmevm.deployment.export import export_onnx, verify_onnx
from mmevm.deployment.predictions import compare_detections
from mmevm.errors import ExportError
from mmevm.models import EfficientViM

if not EXPORTS_ONNX:
    pytest.skip('ONNX export needs torch 2.7', allow_module_level=True)
onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxscript')
onnxruntime = pytest.importorskip('onnxruntime')

TOOL = ROOT / 'tools' / 'export_onnx.py'
CLASSIFIER = ROOT / 'configs' / 'classification' / 'efficientvim-m1_300e_in1k.py'
RETINANET = ROOT / 'configs' / 'retinanet_evm_m1.py'
ARCH = dict(embed_dims=(16, 32, 48), depths=(1, 2, 1), state_dims=(9, 4, 4))
SIZES = [(1, 3, 97, 131), (3, 3, 64, 160), (2, 3, 33, 32)]  # none is used by the export or its verification

TINY_RETINANET = f"""
_base_ = '{RETINANET}'
model = dict(
    backbone=dict(arch=dict(_delete_=True, **{ARCH!r})),
    neck=dict(in_channels=[16, 32, 48], out_channels=24),
    bbox_head=dict(num_classes=3, in_channels=24, feat_channels=24, stacked_convs=1),
)
"""
TINY_CLASSIFIER = f"""
_base_ = '{CLASSIFIER}'
model = dict(
    backbone=dict(arch=dict(_delete_=True, **{ARCH!r})), head=dict(num_classes=10, in_channels=[16, 32, 48, 48])
)
test_dataloader = dict(dataset=dict(metainfo=dict(classes=tuple('abcdefghij'))))
"""


class Function(nn.Module):
    """A convolution and a function of its map."""

    def __init__(self, function):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.function = function

    def forward(self, x):
        return self.function(self.conv(x))


def function(f=lambda x: x):
    return Function(f).eval()


def in_onnxruntime(file):
    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    return lambda x: dict(
        zip([o.name for o in session.get_outputs()], session.run(None, {'image': x.numpy()}), strict=True)
    )


def in_openvino(file):
    compiled = (
        pytest.importorskip('openvino')
        .Core()
        .compile_model(
            str(file),
            'CPU',
            dict(INFERENCE_PRECISION_HINT='f32'),  # some CPUs would use bfloat16
        )
    )
    return lambda x: {o.any_name: value for o, value in compiled({'image': x.numpy()}).items()}


def assert_same(outputs, expected, tolerance=1e-3):
    """Compare a dict of arrays with a sequence of tensors."""
    assert len(outputs) == len(expected)
    for (name, out), ref in zip(outputs.items(), expected, strict=True):
        assert out.shape == tuple(ref.shape), name
        assert (torch.from_numpy(out) - ref).abs().max() < tolerance * ref.abs().max(), name


def properties(file):
    return {entry.key: entry.value for entry in onnx.load(file).metadata_props}


def test_export_flattens_nested_outputs_and_accepts_any_size(tmp_path):
    model = function(lambda x: (x, [x.mean((2, 3)), (x.relu(),)]))
    difference = export_onnx(
        model, tmp_path / 'a.onnx', torch.randn(2, 3, 16, 24), output_names=['map', 'mean', 'positive'],
        metadata=dict(weights='random'), opset=20,
    )  # fmt: skip
    assert 0 <= difference < 1e-5
    assert list(tmp_path.iterdir()) == [tmp_path / 'a.onnx']
    written = onnx.load(tmp_path / 'a.onnx')
    onnx.checker.check_model(written, full_check=True)
    assert [(entry.domain, entry.version) for entry in written.opset_import] == [('', 20)]
    (given,) = written.graph.input
    sides = [side.dim_param or side.dim_value for side in given.type.tensor_type.shape.dim]
    assert (given.name, sides) == ('image', ['batch', 3, 'height', 'width'])
    assert properties(tmp_path / 'a.onnx') == dict(weights='random')
    for size in SIZES:
        x = torch.randn(size)
        outputs = in_onnxruntime(tmp_path / 'a.onnx')(x)
        assert list(outputs) == ['map', 'mean', 'positive']
        y = model.conv(x).detach()
        assert_same(outputs, [y, y.mean((2, 3)), y.relu()])


def test_sides_may_have_to_be_multiples(tmp_path):
    model = function(lambda x: nn.functional.pixel_unshuffle(x, 2))  # of a map of stride 2
    with pytest.raises(ExportError, match='pixel_unshuffle'):
        export_onnx(model, tmp_path / 'any.onnx', torch.randn(2, 3, 64, 96))
    export_onnx(model, tmp_path / 'multiples.onnx', torch.randn(2, 3, 64, 96), size_divisor=4)
    x = torch.randn(1, 3, 36, 44)
    torch.testing.assert_close(
        torch.from_numpy(in_onnxruntime(tmp_path / 'multiples.onnx')(x)['output_0']), model(x), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize('deployed', [False, True])
def test_graph_of_the_backbone_accepts_any_size(deployed):
    """Without a second attempt in strict mode, which takes several times as long."""
    model = EfficientViM(ARCH).eval()
    if deployed:
        model.switch_to_deploy()
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(model, (torch.rand(2, 3, 256, 384),), dynamic_shapes=(sizes,), strict=False)
    x = torch.rand(3, 3, 97, 131)
    torch.testing.assert_close(program.module()(x), model(x), atol=1e-4, rtol=1e-4)


def test_file_contains_no_source_paths(tmp_path):
    export_onnx(function(), tmp_path / 'a.onnx', torch.randn(2, 3, 16, 24))
    content = (tmp_path / 'a.onnx').read_bytes()
    assert b'output_0' in content
    assert b'.py' not in content


def test_fixed_shape_rejects_other_sizes(tmp_path):
    model = function(lambda x: x * torch.arange(int(x.shape[3])))
    export_onnx(model, str(tmp_path / 'a.onnx'), torch.randn(1, 3, 16, 24), dynamic=False)
    x = torch.randn(1, 3, 16, 24)
    assert_same(in_onnxruntime(tmp_path / 'a.onnx')(x), [model(x).detach()])
    with pytest.raises(Exception, match='invalid dimensions'):
        in_onnxruntime(tmp_path / 'a.onnx')(torch.randn(1, 3, 16, 26))


@pytest.mark.parametrize(
    ('f', 'message'),
    [
        (lambda x: torch.cat([x[i] for i in range(len(x))]), r'Function cannot be exported .*of 2 .*shape\[0\]'),
        (lambda x: x * torch.arange(int(x.shape[3])), r'file of Function fails for images of 3×3×13×17'),
        (lambda x: x.repeat(2 if x.shape[0] == 1 else 1, 1, 1, 1), r'output_0 .* for images of 1×3×16×24'),
        (lambda x: x * 2 if x.shape[2] % 2 else x, r'output_0 differs from PyTorch for images of \d×3×\d+×\d+'),
        (lambda x: x if x.mean() > 0 else -x, r'Function cannot be exported to ONNX: '),
        (lambda x: x.log(), r'differs from PyTorch for images of .* by nan'),
        (lambda x: dict(shape=x.shape[0]), r'itself fails for images of 2×3×16×24, .* returns no tensor'),
    ],
    ids=['loop', 'width', 'branch on the batch', 'branch on a side', 'branch on values', 'not a number', 'no tensor'],
)  # fmt: skip
def test_failed_export_keeps_the_old_file(tmp_path, f, message):
    (tmp_path / 'a.onnx').write_text('old')
    with pytest.raises(ExportError, match=message):
        export_onnx(function(f), tmp_path / 'a.onnx', torch.randn(2, 3, 16, 24))
    assert [path.name for path in tmp_path.iterdir()] == ['a.onnx']
    assert (tmp_path / 'a.onnx').read_text() == 'old'


def test_verification_compares_with_the_reference(tmp_path):
    model, x = function(), torch.randn(2, 3, 16, 24)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.conv.weight *= 1.01
    with pytest.raises(ExportError, match=r'The ONNX file of Function: output_0 differs .* more than 1e-03'):
        export_onnx(model, tmp_path / 'a.onnx', x, reference=other)
    assert list(tmp_path.iterdir()) == []
    export_onnx(model, tmp_path / 'a.onnx', x)
    assert verify_onnx(tmp_path / 'a.onnx', model, [x]) < 1e-5
    assert 1e-3 < verify_onnx(tmp_path / 'a.onnx', other, [x], tolerance=0.1) < 0.1
    with pytest.raises(ExportError, match='differs from PyTorch for images of 2×3×16×24'):
        verify_onnx(tmp_path / 'a.onnx', other, [x])
    other.function = lambda y: (y, y)
    with pytest.raises(ExportError, match='has 1 outputs, expected 2'):
        verify_onnx(tmp_path / 'a.onnx', other, [x])
    (tmp_path / 'b.onnx').write_text('nothing')
    with pytest.raises(ExportError, match=r'The ONNX file of Function: .*b\.onnx cannot be loaded by ONNX Runtime'):
        verify_onnx(tmp_path / 'b.onnx', model, [x])


def test_invalid_arguments_raise(tmp_path):
    x = torch.randn(2, 3, 16, 24)
    with pytest.raises(ValueError, match=r'call its eval\(\) first'):
        export_onnx(function().train(), tmp_path / 'a.onnx', x)
    with pytest.raises(ValueError, match='opset=17'):
        export_onnx(function(), tmp_path / 'a.onnx', x, opset=17)
    with pytest.raises(ValueError, match='takes a 1 for a constant'):
        export_onnx(function(), tmp_path / 'a.onnx', x[:1])
    with pytest.raises(ValueError, match='expected 1 different names'):
        export_onnx(function(), tmp_path / 'a.onnx', x, output_names=['a', 'b'])
    with pytest.raises(ExportError, match=r'there is no folder .*nowhere'):
        export_onnx(function(), tmp_path / 'nowhere' / 'a.onnx', x)
    with pytest.raises(ExportError, match='is a folder'):
        export_onnx(function(), tmp_path, x)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('package', ['onnx', 'onnxscript', 'onnxruntime'])
def test_missing_package_raises(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf"needs {package}: run pip install 'mmevm\[export\]'"):
        export_onnx(function(), tmp_path / 'a.onnx', torch.randn(2, 3, 16, 24))


@pytest.fixture(scope='module')
def deployed_backbone(tmp_path_factory):
    """A trained backbone, and the file exported from its deploy mode."""
    torch.manual_seed(0)
    model = randomize(EfficientViM(ARCH, out_strides=(4, 8, 16, 32, 64), out_hidden_states=True)).eval()
    deployed = copy.deepcopy(model)
    deployed.switch_to_deploy()
    file = tmp_path_factory.mktemp('onnx') / 'backbone.onnx'
    export_onnx(deployed, file, torch.randn(2, 3, 128, 192), reference=model)
    return model, file


@pytest.mark.slow
@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('runtime', [in_onnxruntime, in_openvino])
def test_exported_deploy_mode_agrees_with_the_trained_backbone(deployed_backbone, runtime, size):
    model, file = deployed_backbone
    x = torch.randn(size)
    with torch.no_grad():
        assert_same(runtime(file)(x), model(x))


@pytest.mark.slow
def test_graph_has_fused_operators_and_no_batch_norm(deployed_backbone):
    _, file = deployed_backbone
    counts = Counter(node.op_type for node in onnx.load(file).graph.node)
    assert counts['LayerNormalization'] == counts['Softmax'] == sum(ARCH['depths'])
    assert not counts.keys() & {'BatchNormalization', 'Expand', 'Where', 'Cast', 'If', 'Loop'}


@pytest.mark.slow
def test_tool_exports_a_classifier_from_its_checkpoint(tmp_path):
    (tmp_path / 'tiny.py').write_text(TINY_CLASSIFIER)
    model = randomize(build_without_weights(Config.fromfile(tmp_path / 'tiny.py'))).eval()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'trained.pth')
    printed = succeed(TOOL, 'tiny.py', '--part', 'model', 'trained.pth', 'out.onnx', cwd=tmp_path)
    assert 'outputs: logits\n' in printed
    assert 'WARNING' not in printed
    about = properties(tmp_path / 'out.onnx')
    assert (about['mmevm_version'], about['config'], about['part']) == (__version__, 'tiny.py', 'model')
    assert (about['weights'], about['deployed'], about['channel_order']) == ('trained.pth', 'true', 'RGB')
    for size in SIZES:
        x = torch.randn(size)
        outputs = in_onnxruntime(tmp_path / 'out.onnx')(x)
        assert list(outputs) == ['logits']
        with torch.no_grad():
            assert_same(outputs, [model(x)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ['out.onnx', 'tiny.py', 'trained.pth']


@pytest.mark.slow
@pytest.mark.parametrize('part', ['neck', 'model'])
def test_tool_exports_a_detector_from_its_checkpoint(tmp_path, part):
    (tmp_path / 'tiny.py').write_text(TINY_RETINANET)
    model = randomize(build_without_weights(Config.fromfile(tmp_path / 'tiny.py'))).eval()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'trained.pth')
    succeed(TOOL, 'tiny.py', 'trained.pth', 'out.onnx', *(['--part', 'model'] * (part == 'model')), cwd=tmp_path)
    about = properties(tmp_path / 'out.onnx')
    assert (about['part'], about['strides'], about['pad_size_divisor']) == (part, '8 16 32 64 128', '32')
    for size in SIZES:
        x = torch.randn(size)
        with torch.no_grad():
            maps = model.extract_feat(x)
            expected = maps if part == 'neck' else [level for levels in model.bbox_head(maps) for level in levels]
        assert_same(in_onnxruntime(tmp_path / 'out.onnx')(x), expected)


@pytest.mark.slow
def test_tool_exports_detections_equal_to_mmdetection(tmp_path):
    (tmp_path / 'tiny.py').write_text(TINY_RETINANET)
    torch.manual_seed(0)
    threshold = 0.9  # some images have many objects above it, some few
    counts = set()
    model = randomize(build_without_weights(Config.fromfile(tmp_path / 'tiny.py'))).eval()
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'trained.pth')
    options = ['--cfg-options', f'model.test_cfg.score_thr={threshold}']
    printed = succeed(TOOL, 'tiny.py', 'trained.pth', 'out.onnx', '--part', 'detections', *options, cwd=tmp_path)
    assert 'outputs: dets, labels\n' in printed
    cfg = Config(dict(model.test_cfg, score_thr=threshold))
    for runtime, size in itertools.product((in_onnxruntime, in_openvino), SIZES):
        x = torch.randn(size)
        with torch.no_grad():
            metas = [dict(img_shape=size[2:])] * len(x)
            expected = model.bbox_head.predict_by_feat(*model(x), batch_img_metas=metas, cfg=cfg)
        outputs = runtime(tmp_path / 'out.onnx')(x)
        for dets, labels, image in zip(outputs['dets'], outputs['labels'], expected, strict=True):
            count = len(image.scores)
            counts.add(count)
            assert count <= len(dets) == 100
            assert (dets[count:, 4] == 0).all()
            assert (labels[count:] == -1).all()
            rows = torch.cat([image.bboxes, image.scores.unsqueeze(1)], 1)
            assert max(compare_detections(
                [torch.from_numpy(dets)[None], torch.from_numpy(labels)[None]], [rows[None], image.labels[None]]
            )) < 1e-3  # fmt: skip
    assert max(counts) == 100
    assert 0 < min(counts) < 30


@pytest.mark.slow
def test_tool_exports_a_backbone_saved_in_deploy_mode_for_one_shape(tmp_path):
    (tmp_path / 'tiny.py').write_text(TINY_RETINANET)
    model = randomize(EfficientViM(ARCH)).eval()
    deployed = copy.deepcopy(model)
    deployed.switch_to_deploy()
    torch.save(dict(state_dict=deployed.state_dict()), tmp_path / 'deployed.pth')
    arguments = ['--part', 'backbone', '--shape', 65, 96, '--cfg-options', 'model.backbone.deploy=True']
    succeed(TOOL, 'tiny.py', 'deployed.pth', 'out.onnx', *arguments, cwd=tmp_path)
    x = torch.randn(1, 3, 65, 96)
    outputs = in_onnxruntime(tmp_path / 'out.onnx')(x)
    assert list(outputs) == ['stride16', 'stride32', 'stride64']
    with torch.no_grad():
        assert_same(outputs, model(x))


@pytest.fixture
def export(monkeypatch, capsys, tmp_path):
    """Run the tool in this process and an empty folder, and return its error message."""

    def call(*arguments):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            run_here(monkeypatch, TOOL, *arguments)
        assert list(tmp_path.glob('*.onnx')) == []
        return ended.value.code if isinstance(ended.value.code, str) else capsys.readouterr().err.splitlines()[-1]

    return call


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['nowhere.py', 'a.onnx'], 'ConfigError: nowhere.py cannot be read'),
        ([CLASSIFIER, 'nowhere.pth', 'a.onnx'], 'CheckpointError: There is no checkpoint nowhere.pth'),
        ([CLASSIFIER, 'nowhere/a.onnx'], 'ExportError: nowhere/a.onnx cannot be written: there is no folder nowhere'),
        ([CLASSIFIER, 'a.onnx', '--part', 'neck'], 'ConfigError: --part neck is for detectors'),
        ([CLASSIFIER, 'a.onnx', '--cfg-options', 'model.backbone.norm_cfg.type=LN2d'], 'ConfigError: .* --no-deploy'),
        ([CLASSIFIER, 'a.onnx', '--opset', 17], 'error: --opset 17'),
        ([CLASSIFIER, 'a.onnx', '--shape', 0], r'error: --shape \[0\]: expected'),
        ([CLASSIFIER, 'a.onnx', 'a.pth'], r'error: out=a.pth: expected a name that ends in .onnx'),
    ],
)  # fmt: skip
def test_tool_prints_errors_in_one_line(export, arguments, message):
    assert re.search(message, export(*arguments))


def test_tool_refuses_a_checkpoint_of_another_model(export, tmp_path):
    torch.save(dict(state_dict=EfficientViM(ARCH).state_dict()), tmp_path / 'other.pth')
    assert 'other.pth does not fit the model' in export(CLASSIFIER, tmp_path / 'other.pth', 'a.onnx')
    words = export(CLASSIFIER, tmp_path / 'other.pth', 'a.onnx', '--part', 'backbone')
    assert words.startswith('CheckpointError: ')
    assert 'of the ' in words
