"""ONNX files do what PyTorch does, in ONNX Runtime and OpenVINO, and what does not becomes no file."""

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
from mmevm.analysis.complexity import build_without_weights
from mmevm.deployment.export import ExportError, ModelPart, check_onnx, export_coreml, export_onnx, preprocessing
from mmevm.deployment.post_processing import differences
from mmevm.errors import ConfigError
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
SIZES = [(1, 3, 97, 131), (3, 3, 64, 160), (2, 3, 33, 32)]  # none of which a file is exported or checked at

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
"""


class Function(nn.Module):
    """A convolution, and what is made of its map."""

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
            dict(INFERENCE_PRECISION_HINT='f32'),  # some CPUs would take bfloat16
        )
    )
    return lambda x: {o.any_name: value for o, value in compiled({'image': x.numpy()}).items()}


def assert_same(outputs, expected, tolerance=1e-3):
    """Of a dict of arrays and a sequence of tensors."""
    assert len(outputs) == len(expected)
    for (name, out), ref in zip(outputs.items(), expected, strict=True):
        assert out.shape == tuple(ref.shape), name
        assert (torch.from_numpy(out) - ref).abs().max() < tolerance * ref.abs().max(), name


def properties(file):
    return {entry.key: entry.value for entry in onnx.load(file).metadata_props}


def test_nested_outputs_one_after_another_at_any_size(tmp_path):
    model = function(lambda x: (x, [x.mean((2, 3)), (x.relu(),)]))
    difference = export_onnx(
        model, tmp_path / 'a.onnx', torch.randn(2, 3, 16, 24), output_names=['map', 'mean', 'positive'],
        metadata=dict(weights='of this test'), opset=20,
    )  # fmt: skip
    assert 0 <= difference < 1e-5
    assert list(tmp_path.iterdir()) == [tmp_path / 'a.onnx']
    written = onnx.load(tmp_path / 'a.onnx')
    onnx.checker.check_model(written, full_check=True)
    assert [(entry.domain, entry.version) for entry in written.opset_import] == [('', 20)]
    (given,) = written.graph.input
    sides = [side.dim_param or side.dim_value for side in given.type.tensor_type.shape.dim]
    assert (given.name, sides) == ('image', ['batch', 3, 'height', 'width'])
    assert properties(tmp_path / 'a.onnx') == dict(weights='of this test')
    for size in SIZES:
        x = torch.randn(size)
        outputs = in_onnxruntime(tmp_path / 'a.onnx')(x)
        assert list(outputs) == ['map', 'mean', 'positive']
        y = model.conv(x).detach()
        assert_same(outputs, [y, y.mean((2, 3)), y.relu()])


def test_nothing_of_this_disk_is_in_a_file(tmp_path):
    export_onnx(function(), tmp_path / 'a.onnx', torch.randn(2, 3, 16, 24))
    content = (tmp_path / 'a.onnx').read_bytes()
    assert b'output_0' in content
    assert b'.py' not in content


def test_a_fixed_shape_and_no_other(tmp_path):
    model = function(lambda x: x * torch.arange(int(x.shape[3])))
    export_onnx(model, str(tmp_path / 'a.onnx'), torch.randn(1, 3, 16, 24), dynamic=False)
    x = torch.randn(1, 3, 16, 24)
    assert_same(in_onnxruntime(tmp_path / 'a.onnx')(x), [model(x).detach()])
    with pytest.raises(Exception, match='invalid dimensions'):
        in_onnxruntime(tmp_path / 'a.onnx')(torch.randn(1, 3, 16, 26))


@pytest.mark.parametrize(
    ('f', 'sentence'),
    [
        (lambda x: torch.cat([x[i] for i in range(len(x))]), r'Function cannot be written .*of 2 .*shape\[0\]'),
        (lambda x: x * torch.arange(int(x.shape[3])), r'file of Function fails for images of 3×3×13×17'),
        (lambda x: x.repeat(2 if x.shape[0] == 1 else 1, 1, 1, 1), r'output_0 .* for images of 1×3×16×24'),
        (lambda x: x * 2 if x.shape[2] % 2 else x, r'output_0 .* differs from PyTorch for images of \d×3×\d+×\d+'),
        (lambda x: x if x.mean() > 0 else -x, r'Function cannot be written as ONNX: '),
        (lambda x: x.log(), r'differs from PyTorch for images of .* by nan'),
        (lambda x: dict(map=x), r'itself fails for images of 2×3×16×24, .* returns a dict'),
    ],
    ids=['loop', 'width', 'branch on the batch', 'branch on a side', 'branch on values', 'not a number', 'dict'],
)  # fmt: skip
def test_what_is_wrong_for_other_images_leaves_the_old_file_as_it_was(tmp_path, f, sentence):
    (tmp_path / 'a.onnx').write_text('old')
    with pytest.raises(ExportError, match=sentence):
        export_onnx(function(f), tmp_path / 'a.onnx', torch.randn(2, 3, 16, 24))
    assert [path.name for path in tmp_path.iterdir()] == ['a.onnx']
    assert (tmp_path / 'a.onnx').read_text() == 'old'


def test_a_file_is_compared_with_the_reference(tmp_path):
    model, x = function(), torch.randn(2, 3, 16, 24)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.conv.weight *= 1.01
    with pytest.raises(ExportError, match=r'output_0 of the ONNX file of Function differs .* at most 1e-03'):
        export_onnx(model, tmp_path / 'a.onnx', x, reference=other)
    assert list(tmp_path.iterdir()) == []
    export_onnx(model, tmp_path / 'a.onnx', x)
    assert check_onnx(tmp_path / 'a.onnx', model, [x]) < 1e-5
    assert 1e-3 < check_onnx(tmp_path / 'a.onnx', other, [x], tolerance=0.1) < 0.1
    with pytest.raises(ExportError, match='differs from PyTorch for images of 2×3×16×24'):
        check_onnx(tmp_path / 'a.onnx', other, [x])
    other.function = lambda y: (y, y)
    with pytest.raises(ExportError, match='has 1 outputs in place of 2'):
        check_onnx(tmp_path / 'a.onnx', other, [x])
    (tmp_path / 'b.onnx').write_text('nothing')
    with pytest.raises(ExportError, match='ONNX Runtime does not take the file of Function'):
        check_onnx(tmp_path / 'b.onnx', model, [x])


def test_what_cannot_be_meant_is_refused(tmp_path):
    x = torch.randn(2, 3, 16, 24)
    with pytest.raises(ValueError, match=r'call its eval\(\) first'):
        export_onnx(function().train(), tmp_path / 'a.onnx', x)
    with pytest.raises(ValueError, match='opset=17'):
        export_onnx(function(), tmp_path / 'a.onnx', x, opset=17)
    with pytest.raises(ValueError, match='takes a 1 for a constant'):
        export_onnx(function(), tmp_path / 'a.onnx', x[:1])
    with pytest.raises(ValueError, match='1 outputs, which need a name each'):
        export_onnx(function(), tmp_path / 'a.onnx', x, output_names=['a', 'b'])
    with pytest.raises(ExportError, match=r'there is no folder .*nowhere'):
        export_onnx(function(), tmp_path / 'nowhere' / 'a.onnx', x)
    with pytest.raises(ExportError, match='is a folder'):
        export_onnx(function(), tmp_path, x)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('package', ['onnx', 'onnxscript', 'onnxruntime'])
def test_a_missing_package_is_named_with_what_to_install(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf"needs {package}, not installed .* pip install 'mmevm\[export\]'"):
        export_onnx(function(), tmp_path / 'a.onnx', torch.randn(2, 3, 16, 24))


@pytest.fixture(scope='module')
def deployed_backbone(tmp_path_factory):
    """The trained form, and the file of its deploy form."""
    torch.manual_seed(0)
    model = randomize(EfficientViM(ARCH, out_hidden_states=True)).eval()
    deployed = copy.deepcopy(model)
    deployed.switch_to_deploy()
    file = tmp_path_factory.mktemp('onnx') / 'backbone.onnx'
    export_onnx(deployed, file, torch.randn(2, 3, 128, 192), reference=model)
    return model, file


@pytest.mark.slow
@pytest.mark.parametrize('size', SIZES, ids=str)
@pytest.mark.parametrize('runtime', [in_onnxruntime, in_openvino])
def test_the_deploy_form_gives_what_the_trained_form_gives(deployed_backbone, runtime, size):
    model, file = deployed_backbone
    x = torch.randn(size)
    with torch.no_grad():
        assert_same(runtime(file)(x), model(x))


@pytest.mark.slow
def test_the_graph_has_whole_operators_and_no_batch_norm(deployed_backbone):
    _, file = deployed_backbone
    counts = Counter(node.op_type for node in onnx.load(file).graph.node)
    assert counts['LayerNormalization'] == counts['Softmax'] == sum(ARCH['depths'])
    assert not counts.keys() & {'BatchNormalization', 'Expand', 'Where', 'Cast', 'If', 'Loop'}


def test_parts_and_the_names_of_their_outputs():
    retinanet = build_without_weights(Config.fromfile(RETINANET)).eval()
    assert ModelPart(retinanet).part == 'neck'
    pyramid = ['stride8', 'stride16', 'stride32', 'stride64', 'stride128']
    assert ModelPart(retinanet).output_names() == pyramid
    assert ModelPart(retinanet, 'backbone').output_names() == ['stride16', 'stride32', 'stride64']
    heads = [f'{what}_{level}' for what in ('cls_scores', 'bbox_preds') for level in pyramid]
    assert ModelPart(retinanet, 'model').output_names() == heads
    classifier = build_without_weights(Config.fromfile(CLASSIFIER)).eval()
    assert ModelPart(classifier).part == 'model'
    assert ModelPart(classifier).output_names() == ['logits']
    states = [f'hidden_states_{i}' for i in range(3)]
    assert ModelPart(classifier, 'backbone').output_names() == [*states, 'stride64']


def test_a_part_that_a_model_has_not_is_refused():
    classifier = build_without_weights(Config.fromfile(CLASSIFIER))
    with pytest.raises(ConfigError, match='neck is for detectors'):
        ModelPart(classifier, 'neck')
    with pytest.raises(ConfigError, match='has no backbone'):
        ModelPart(nn.Identity(), 'backbone')
    with pytest.raises(ConfigError, match='detections is for detectors'):
        ModelPart(classifier, 'detections')
    with pytest.raises(ConfigError, match=r'choose from backbone, neck, model, detections'):
        ModelPart(classifier, 'head')
    mask_rcnn = build_without_weights(Config.fromfile(ROOT / 'configs/maskrcnn_evm_m1.py'))
    for part in ('model', 'detections'):
        with pytest.raises(ConfigError, match=rf'part {part} .* not for a MaskRCNN.*take neck'):
            ModelPart(mask_rcnn, part)


def test_preprocessing_in_either_library():
    imagenet = dict(image_mean='[123.675, 116.28, 103.53]', image_std='[58.395, 57.12, 57.375]', channel_order='RGB')
    assert preprocessing(Config.fromfile(RETINANET)) == dict(imagenet, pad_size_divisor='32')
    assert preprocessing(Config.fromfile(CLASSIFIER)) == dict(imagenet, pad_size_divisor='1')
    plain = Config(dict(model=dict(backbone=dict(in_channels=1))))
    nothing = dict(image_mean='[0.0]', image_std='[1.0]', channel_order='BGR', pad_size_divisor='1')
    assert preprocessing(plain) == nothing


@pytest.mark.slow
def test_a_classifier_from_its_checkpoint(tmp_path):
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
def test_a_detector_from_its_checkpoint(tmp_path, part):
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
def test_boxes_of_a_detector_as_mmdetection_finds_them(tmp_path):
    (tmp_path / 'tiny.py').write_text(TINY_RETINANET)
    torch.manual_seed(0)
    threshold = 0.9  # of many objects and of few
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
            assert max(differences(
                [torch.from_numpy(dets)[None], torch.from_numpy(labels)[None]], [rows[None], image.labels[None]]
            )) < 1e-3  # fmt: skip
    assert max(counts) == 100
    assert 0 < min(counts) < 30


@pytest.mark.slow
def test_a_backbone_saved_in_the_deploy_form_for_one_shape(tmp_path):
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


@pytest.mark.slow
def test_a_coreml_package_of_the_deploy_form(tmp_path):
    coremltools = pytest.importorskip('coremltools')
    (tmp_path / 'tiny.py').write_text(TINY_RETINANET)
    printed = succeed(TOOL, 'tiny.py', 'out.mlpackage', '--shape', 64, 96, cwd=tmp_path)
    assert 'not compared' in printed
    package = coremltools.models.MLModel(str(tmp_path / 'out.mlpackage'), skip_model_load=True)
    (given,) = package.get_spec().description.input
    assert (given.name, list(given.type.multiArrayType.shape)) == ('image', [1, 3, 64, 96])
    strides = [output.name for output in package.get_spec().description.output]
    assert strides == ['stride8', 'stride16', 'stride32', 'stride64', 'stride128']
    assert package.user_defined_metadata['channel_order'] == 'RGB'


def test_what_cannot_be_a_coreml_package(tmp_path, monkeypatch):
    x = torch.randn(1, 3, 16, 24)
    with pytest.raises(ExportError, match='there is no folder'):
        export_coreml(function(), tmp_path / 'nowhere' / 'a.mlpackage', x, ['map'])
    monkeypatch.setitem(sys.modules, 'coremltools', None)
    with pytest.raises(ExportError, match='pip install coremltools'):
        export_coreml(function(), tmp_path / 'a.mlpackage', x, ['map'])


@pytest.fixture
def export(monkeypatch, capsys, tmp_path):
    """The tool in this process, in a folder of its own: what it ends with."""

    def call(*arguments):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            run_here(monkeypatch, TOOL, *arguments)
        assert list(tmp_path.glob('*.onnx')) == []
        return ended.value.code if isinstance(ended.value.code, str) else capsys.readouterr().err.splitlines()[-1]

    return call


@pytest.mark.parametrize(
    ('arguments', 'sentence'),
    [
        (['nowhere.py', 'a.onnx'], 'ConfigError: nowhere.py cannot be read'),
        ([CLASSIFIER, 'nowhere.pth', 'a.onnx'], 'CheckpointError: There is no checkpoint nowhere.pth'),
        ([CLASSIFIER, 'nowhere/a.onnx'], 'ExportError: nowhere/a.onnx cannot be written: there is no folder nowhere'),
        ([CLASSIFIER, 'a.onnx', '--part', 'neck'], 'ConfigError: --part neck is for detectors'),
        ([CLASSIFIER, 'a.onnx', '--cfg-options', 'model.backbone.norm_cfg.type=LN2d'], 'ConfigError: .* --no-deploy'),
        ([CLASSIFIER, 'a.onnx', '--opset', 17], 'error: --opset 17'),
        ([CLASSIFIER, 'a.onnx', '--shape', 0], r'error: --shape takes .* not \[0\]'),
        ([CLASSIFIER, 'a.onnx', 'a.pth'], r'error: a.pth: the file to write comes last'),
        ([CLASSIFIER, 'a.mlpackage'], 'error: a.mlpackage: a CoreML package is of one size'),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_ends_in_a_sentence(export, arguments, sentence):
    assert re.search(sentence, export(*arguments))


def test_a_checkpoint_of_another_model_is_refused(export, tmp_path):
    torch.save(dict(state_dict=EfficientViM(ARCH).state_dict()), tmp_path / 'other.pth')
    assert 'other.pth does not fit the model' in export(CLASSIFIER, tmp_path / 'other.pth', 'a.onnx')
    words = export(CLASSIFIER, tmp_path / 'other.pth', 'a.onnx', '--part', 'backbone')
    assert words.startswith('CheckpointError: ')
    assert 'of the ' in words
