"""Exported files give the results of the config and the checkpoint, from reading the image on; so does the example."""

import importlib.util
import json

import cv2
import numpy as np
import pytest
from bccd import BCCD, needs_bccd
from command_line import ROOT, run_here
from mmengine.config import Config
from pycocotools import mask as rle
from tiny_models import write_classifier, write_small
from versions import EXPORTS_ONNX

from mmevm.errors import ConfigError, EngineError, ExportError, UserError
from mmevm.inference import build_inferencer, build_onnx_inferencer, check_images

if not EXPORTS_ONNX:
    pytest.skip('ONNX export needs torch 2.7', allow_module_level=True)
onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxscript')
onnxruntime = pytest.importorskip('onnxruntime')
pytestmark = pytest.mark.slow

EXPORT, INFER = ROOT / 'tools/export_onnx.py', ROOT / 'tools/infer.py'
EXAMPLE = ROOT / 'examples/onnx_detector.py'
DETECTORS = {
    'maskrcnn_evm_m1.py': 'instance segmentation',
    'rtmdet/rtmdet-ins_evm_m1.py': 'instance segmentation',
    'mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py': 'instance segmentation',
    'faster_rcnn/faster-rcnn_evm_m1.py': 'detection',
    'rtmdet/rtmdet_evm_m1.py': 'detection',
}


class Exported:
    """A model with random weights, exported by the tool."""

    def __init__(self, config, checkpoint, images, part):
        self.config, self.checkpoint, self.file = config, checkpoint, str(config.with_suffix('.onnx'))
        self.pytorch = build_inferencer(Config.fromfile(config), str(checkpoint), 'cpu')
        with pytest.MonkeyPatch.context() as patch:
            arguments = ['--part', part, '--verify-images', images]
            run_here(patch, EXPORT, config, checkpoint, self.file, *arguments)

    def both(self, images, **options):
        """Return the predictions of PyTorch and of ONNX Runtime."""
        return self.pytorch.infer(images, **options), build_onnx_inferencer(self.file, 'cpu').infer(images, **options)


@pytest.fixture(scope='module', params=DETECTORS)
def detector(request, tmp_path_factory, images):
    files = write_small(tmp_path_factory.mktemp('small'), request.param, score_thr=0.3)
    exported = Exported(*files, images, 'detections')
    exported.task = DETECTORS[request.param]
    return exported


@pytest.fixture(scope='module')
def classifier(tmp_path_factory, images):
    return Exported(*write_classifier(tmp_path_factory.mktemp('classifier')), images, 'model')


def assert_same(result, expected):
    assert result.keys() == expected.keys()
    assert result['labels'] == expected['labels']
    assert result['class_names'] == expected['class_names']
    np.testing.assert_allclose(result['scores'], expected['scores'], atol=1e-4)
    np.testing.assert_allclose(result['bboxes'], expected['bboxes'], atol=0.02)
    if 'masks' in expected:
        masks, others = (rle.decode(side['masks']).astype(bool) for side in (result, expected))
        assert masks.shape == others.shape
        assert (masks ^ others).sum() < 1e-3 * (masks | others).sum()


def test_detections_of_images_of_different_sizes(detector, images):
    """In one batch, with padding."""
    read = [detector.pytorch.read(str(images / name)) for name in ('a.png', 'b.jpg')]
    for (expected, _), (result, picture) in zip(*detector.both(read, draw=False), strict=True):
        assert len(expected['labels']) > 1
        assert picture is None
        assert_same(json.loads(json.dumps(result)), expected)


def test_picture(detector, images):
    pictures = []
    for inferencer in (detector.pytorch, build_onnx_inferencer(detector.file)):
        np.random.seed(0)  # mmdet varies the colors of masks
        pictures.append(inferencer.infer([inferencer.read(str(images / 'b.jpg'))], score_thr=0.3)[0][1])
    assert pictures[0].shape == pictures[1].shape
    assert (pictures[0] != pictures[1]).mean() < 0.01


def test_tool_writes_pictures_and_predictions(detector, images, tmp_path, monkeypatch):
    run_here(monkeypatch, INFER, detector.file, images, '--out', tmp_path, '--batch-size', 2)
    assert sorted(path.name for path in tmp_path.rglob('*.*')) == ['a.json', 'a.png', 'b.jpg', 'b.json']
    ((expected, _),) = detector.pytorch.infer([detector.pytorch.read(str(images / 'a.png'))])
    assert_same(json.loads((tmp_path / 'preds/a.json').read_text()), expected)


def test_metadata(detector):
    entries = {entry.key: entry.value for entry in onnx.load(detector.file).metadata_props}
    assert json.loads(entries['classes']) == ['disc', 'box', 'star']
    assert json.loads(entries['palette']) == [[220, 20, 60], [20, 60, 220], [60, 220, 20]]
    assert (entries['task'], entries['score_threshold']) == (detector.task, '0.3')
    assert (entries['config'], entries['weights'], entries['channel_order']) == ('small.py', 'small.pth', 'RGB')


def test_only_standard_operators(detector):
    graph = onnx.load(detector.file)
    assert {node.domain for node in graph.graph.node} <= {'', 'ai.onnx'}
    assert not graph.functions


def test_another_model_does_not_pass(detector, images, tmp_path):
    """The comparison on real images would see wrong metadata and wrong weights."""
    model = onnx.load(detector.file)
    entries = {entry.key: entry for entry in model.metadata_props}
    entries['channel_order'].value = 'BGR'
    onnx.save(model, tmp_path / 'bgr.onnx')
    sources = [str(images / 'a.png')]
    with pytest.raises(ExportError, match=r'a\.png: the results of the ONNX file differ'):
        check_images(str(tmp_path / 'bgr.onnx'), detector.pytorch, sources, 1e-3)
    count, difference = check_images(detector.file, detector.pytorch, sources, 1e-3)
    assert count > 0
    assert difference < 1e-3


def test_damaged_verification_image_is_named(detector, tmp_path):
    (tmp_path / 'cut.png').write_bytes(b'\x89PNG')
    with pytest.raises(ConfigError, match=r'cut\.png cannot be read'):
        check_images(detector.file, detector.pytorch, [str(tmp_path / 'cut.png')], 1e-3)


def test_verification_needs_images(detector, tmp_path, monkeypatch):
    (tmp_path / 'clip.mp4').write_bytes(b'')
    with pytest.raises(SystemExit, match=r'--verify-images .*: contains no image'):
        run_here(
            monkeypatch,
            EXPORT,
            detector.config,
            detector.checkpoint,
            tmp_path / 'a.onnx',
            '--part',
            'detections',
            '--verify-images',
            tmp_path,
        )


def load_example():
    spec = importlib.util.spec_from_file_location('onnx_detector', EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_example(detector, image):
    boxes, scores, labels, masks, meta = load_example().detect(onnxruntime.InferenceSession(detector.file), image)
    result = dict(bboxes=boxes.tolist(), scores=scores.tolist(), labels=labels.tolist())
    if masks is not None:
        result['masks'] = [rle.encode(np.asfortranarray(mask, np.uint8)) for mask in masks]
    return result | dict(class_names=[meta['classes'][label] for label in labels])


def test_example_agrees_with_pytorch(detector, images):
    for path in sorted(images.iterdir()):
        image = cv2.imread(str(path))
        ((expected, _),) = detector.pytorch.infer([image], draw=False)
        assert len(expected['labels']) > 0
        assert_same(run_example(detector, image), expected)


def find_pairs(result, expected):
    """Return the indices of equal objects."""
    pairs = []
    for j, (label, score, box) in enumerate(
        zip(*(expected[key] for key in ('labels', 'scores', 'bboxes')), strict=True)
    ):
        for i in np.flatnonzero(np.equal(result['labels'], label)):
            is_near = np.abs(np.subtract(result['bboxes'][i], box)).max() < 0.02
            if is_near and abs(result['scores'][i] - score) < 1e-4:
                pairs.append((i, j))
                break
    return pairs


@needs_bccd
def test_example_agrees_on_photographs(detector):
    count, paired, pixels, different = 0, 0, 0, 0
    for path in sorted((BCCD / 'JPEGImages').glob('*.jpg'))[:20]:
        image = cv2.imread(str(path))
        ((expected, _),) = detector.pytorch.infer([image], draw=False)
        result = run_example(detector, image)
        pairs = find_pairs(result, expected)
        count += max(len(result['labels']), len(expected['labels']))
        paired += len(pairs)
        if detector.task == 'instance segmentation' and pairs:
            masks, others = (rle.decode(side['masks']).astype(bool) for side in (result, expected))
            for i, j in pairs:
                different += (masks[..., i] ^ others[..., j]).sum()
                pixels += (masks[..., i] | others[..., j]).sum()
    assert count > 20
    # With random weights, a few of the many pairs of boxes overlap by the threshold of NMS up to rounding.
    assert paired >= 0.98 * count
    assert different <= 1e-3 * pixels


def test_example_draws_and_prints(detector, images, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'out.png'
    run_here(monkeypatch, EXAMPLE, detector.file, images / 'a.png', '--out', out)
    first = capsys.readouterr().out.split()[0]
    assert first in ('disc', 'box', 'star')
    assert (cv2.imread(str(out)) != cv2.imread(str(images / 'a.png'))).any()


def test_example_is_short():
    assert len(EXAMPLE.read_text().splitlines()) < 100


def test_classes(classifier, images):
    read = [classifier.pytorch.read(str(images / name)) for name in ('a.png', 'b.jpg')]
    for (expected, drawn), (result, picture) in zip(*classifier.both(read), strict=True):
        np.testing.assert_allclose(result.pop('pred_scores'), expected.pop('pred_scores'), atol=1e-5)
        assert result.pop('pred_score') == pytest.approx(expected.pop('pred_score'), abs=1e-5)
        assert result == expected
        np.testing.assert_array_equal(picture, drawn)


def test_files_that_cannot_be_used(classifier, tmp_path):
    model = onnx.load(classifier.file)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / 'plain.onnx')
    (tmp_path / 'text.onnx').write_text('nothing')
    for name, message in dict(
        plain='there is no metadata of mmevm', text='cannot be loaded by ONNX Runtime', none='there is no such file'
    ).items():
        with pytest.raises(UserError, match=rf'{name}\.onnx.*{message}'):
            build_onnx_inferencer(str(tmp_path / f'{name}.onnx'))
    with pytest.raises(EngineError, match='--device cuda: expected one of cpu'):
        build_onnx_inferencer(classifier.file, 'cuda')
