"""Boxes and masks of two-stage detectors are those of MMDetection's ``predict``."""

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from randomize import randomize
from tiny_models import shrink

from mmevm.deployment.masks import paste_masks
from mmevm.deployment.model_part import ModelPart
from mmevm.deployment.roi_post_processing import RoIPostProcessing
from mmevm.errors import ConfigError

SIZE = (96, 128)
KINDS = ('faster-rcnn', 'mask-rcnn', 'cascade-rcnn', 'cascade-mask-rcnn')


def build(kind, **rcnn):
    """A small detector with the heads of one of MMDetection's configs."""
    init_default_scope('mmdet')
    torch.manual_seed(0)
    cfg = shrink(Config.fromstring(f"_base_ = 'mmdet::_base_/models/{kind}_r50_fpn.py'", '.py').model)
    cfg.test_cfg.rcnn.update(dict(score_thr=0.2), **rcnn)
    model = randomize(MODELS.build(cfg)).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and name.startswith(('rpn_head', 'roi_head')):  # clear scores, and boxes that move
            torch.nn.init.normal_(parameter, 0, 0.05)
    return model


@pytest.fixture(scope='module', params=KINDS)
def detector(request):
    return build(request.param)


@torch.no_grad()
def predict(model, x, shapes):
    metas = [
        dict(img_shape=shape, ori_shape=shape, batch_input_shape=x.shape[2:], scale_factor=(1.0, 1.0))
        for shape in shapes
    ]
    found = model.predict(x, [DetDataSample(metainfo=meta) for meta in metas], rescale=True)
    return [sample.pred_instances for sample in found]


@torch.no_grad()
def assert_equals_mmdetection(model, x, shapes):
    """Compare both, and return the number of objects of each image."""
    dets, labels, *masks = RoIPostProcessing(model)(model.extract_feat(x), torch.tensor(shapes))
    expected = predict(model, x, shapes)
    for i, (image, shape) in enumerate(zip(expected, shapes, strict=True)):
        count = len(image.scores)
        torch.testing.assert_close(dets[i, :count, :4], image.bboxes, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(dets[i, :count, 4], image.scores)
        assert labels[i].tolist() == image.labels.tolist() + [-1] * (len(labels[i]) - count)
        assert not dets[i, count:, 4].any()
        if masks:
            pasted = paste_masks(masks[0][i, :count].numpy(), image.bboxes.numpy(), shape, 0.5)
            assert image.masks.any()
            assert (torch.from_numpy(pasted) != image.masks).sum() <= 1e-4 * image.masks.sum()
    return [len(image.scores) for image in expected]


def test_detectors_of_mmdetection(detector):
    assert min(assert_equals_mmdetection(detector, torch.randn(2, 3, *SIZE), [SIZE] * 2)) > 0


def test_padding_is_not_part_of_the_image(detector):
    x, shapes = torch.randn(2, 3, *SIZE), [(80, 100), SIZE]
    x[0, :, 80:] = x[0, :, :, 100:] = 0
    assert min(assert_equals_mmdetection(detector, x, shapes)) > 0


@pytest.mark.parametrize(
    ('rcnn', 'least', 'most'),
    [
        (dict(score_thr=0.0, max_per_img=2000), 50, 150),  # 50 proposals, three classes
        (dict(nms=dict(type='nms', iou_threshold=0.3, class_agnostic=True)), 1, 10),
        (dict(score_thr=1.0), 0, 0),
    ],
    ids=['all', 'class-agnostic', 'none'],
)
def test_settings_of_test_cfg(rcnn, least, most):
    counts = assert_equals_mmdetection(build('faster-rcnn', **rcnn), torch.randn(2, 3, *SIZE), [SIZE] * 2)
    assert least <= min(counts) <= max(counts) <= most


def test_rows_without_an_object():
    """The threshold lies between the fifth and the sixth score of an image of ten rows."""
    x = torch.randn(1, 3, *SIZE)
    (found,) = predict(build('mask-rcnn', score_thr=0.0), x, [SIZE])
    threshold = found.scores[4:6].mean().item()
    assert assert_equals_mmdetection(build('mask-rcnn', score_thr=threshold), x, [SIZE]) == [5]


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda m: setattr(m.roi_head.bbox_roi_extractor.roi_layers[0], 'pool_mode', 'max'), 'expected roi_layer=dict'),
        (lambda m: m.roi_head.test_cfg.nms.update(type='soft_nms'), r'test_cfg\.rcnn\.nms=.* cannot be exported'),
        (lambda m: m.rpn_head.test_cfg.nms.update(type='soft_nms'), r'test_cfg\.rpn\.nms=.* cannot be exported'),
        (lambda m: setattr(m.roi_head.bbox_head.loss_cls, 'custom_activation', True), 'has its own post-processing'),
    ],
    ids=['pooling', 'nms', 'nms of proposals', 'activation'],
)
def test_unsupported_settings_raise(change, message):
    model = build('faster-rcnn')
    change(model)
    with pytest.raises(ConfigError, match=message):
        ModelPart(model, 'detections')
