"""Exportable post-processing of dense heads returns the results of MMDetection's own, image by image."""

import pytest
import torch
from mmdet.models.dense_heads import (
    ATSSHead,
    FCOSHead,
    GFLHead,
    RetinaHead,
    RPNHead,
    RTMDetInsSepBNHead,
    RTMDetSepBNHead,
)
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope

from mmevm.deployment.masks import resize_masks
from mmevm.deployment.post_processing import InstancePostProcessing, PostProcessing, ProposalPostProcessing
from mmevm.errors import ConfigError

SIZE = (72, 104)
STRIDES = [8, 16, 32]
SMALL = dict(num_classes=3, in_channels=8, feat_channels=8, stacked_convs=1)
ANCHORS = dict(
    type='AnchorGenerator', ratios=[0.5, 1.0, 2.0], octave_base_scale=4, scales_per_octave=2, strides=STRIDES
)
POINTS = dict(
    anchor_generator=dict(type='MlvlPointGenerator', offset=0, strides=STRIDES),
    bbox_coder=dict(type='DistancePointBBoxCoder'),
    norm_cfg=dict(type='BN'),
    with_objectness=False,
)
ONE = dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=STRIDES)
SOFTMAX = dict(type='CrossEntropyLoss', use_sigmoid=False)
HEADS = {
    'RetinaNet': (RetinaHead, dict(SMALL, anchor_generator=ANCHORS)),
    'RetinaNet, softmax': (RetinaHead, dict(SMALL, anchor_generator=ANCHORS, loss_cls=SOFTMAX)),
    'FCOS': (FCOSHead, dict(SMALL, strides=STRIDES, norm_cfg=None)),
    'ATSS': (ATSSHead, dict(SMALL, anchor_generator=ONE, norm_cfg=None)),
    'RTMDet': (RTMDetSepBNHead, dict(SMALL, **POINTS)),
}


@pytest.fixture(autouse=True)
def _scope():
    init_default_scope('mmdet')


def build(kind, arguments, **test_cfg):
    test_cfg = dict(
        dict(nms_pre=50, score_thr=0.3, nms=dict(type='nms', iou_threshold=0.5), max_per_img=40), **test_cfg
    )
    torch.manual_seed(0)
    head = kind(**arguments, test_cfg=ConfigDict(test_cfg)).eval()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    return head


@torch.no_grad()
def outputs_of(head, batch_size=2):
    torch.manual_seed(1)
    maps = [torch.randn(batch_size, 8, -(-SIZE[0] // stride), -(-SIZE[1] // stride)) for stride in STRIDES]
    return head(maps)


def assert_equals_mmdetection(head, outputs):
    dets, labels = PostProcessing(head)(outputs, sizes_of(outputs))
    expected = head.predict_by_feat(*outputs, batch_img_metas=[dict(img_shape=SIZE)] * len(dets))
    assert_equal(dets, labels, expected, head.test_cfg.max_per_img)
    return [len(image.scores) for image in expected]


def sizes_of(outputs):
    return torch.tensor([SIZE] * len(outputs[0][0]))


def assert_equal(dets, labels, expected, count):
    assert dets.shape == (len(expected), count, 5)
    for rows, kinds, image in zip(dets, labels, expected, strict=True):
        count = len(image.scores)
        torch.testing.assert_close(rows[:count, :4], image.bboxes)
        torch.testing.assert_close(rows[:count, 4], image.scores)
        assert kinds[:count].tolist() == image.labels.tolist()
        assert not rows[count:, 4].any()
        assert set(kinds[count:].tolist()) <= {-1}


@pytest.mark.parametrize(('kind', 'arguments'), HEADS.values(), ids=HEADS)
def test_heads_of_mmdetection(kind, arguments):
    head = build(kind, arguments)
    counts = assert_equals_mmdetection(head, outputs_of(head))
    assert min(counts) > 5


@pytest.mark.parametrize(
    'test_cfg',
    [
        dict(nms_pre=100_000, max_per_img=2000),
        dict(nms_pre=7, score_thr=0.0, max_per_img=7),
        dict(min_bbox_size=30),
        dict(nms=dict(type='nms', iou_threshold=0.2, class_agnostic=True)),
    ],
    ids=str,
)
def test_settings_of_test_cfg(test_cfg):
    head = build(*HEADS['RetinaNet'], **test_cfg)
    assert min(assert_equals_mmdetection(head, outputs_of(head))) > 0


def test_without_nms_pre_all_boxes_are_candidates():
    limited, unlimited = (build(*HEADS['RetinaNet'], nms_pre=nms_pre) for nms_pre in (100_000, -1))
    outputs = outputs_of(limited)
    for one, other in zip(
        PostProcessing(limited)(outputs, sizes_of(outputs)),
        PostProcessing(unlimited)(outputs, sizes_of(outputs)),
        strict=True,
    ):
        assert one.equal(other)


def test_boxes_are_clipped_as_by_the_box_coder():
    inside = build(*HEADS['RetinaNet'])
    coder = dict(type='DeltaXYWHBBoxCoder', clip_border=False)
    across = build(RetinaHead, dict(HEADS['RetinaNet'][1], bbox_coder=coder))
    outputs = outputs_of(inside)
    assert_equals_mmdetection(across, outputs)
    dets, _ = PostProcessing(across)(outputs, sizes_of(outputs))
    assert dets.min() < -1
    assert PostProcessing(inside)(outputs, sizes_of(outputs))[0].min() == 0


def test_boxes_are_clipped_to_the_size_of_each_image():
    head = build(*HEADS['RetinaNet'])
    outputs = outputs_of(head)
    shapes = [SIZE, (50, 60)]
    dets, labels = PostProcessing(head)(outputs, torch.tensor(shapes))
    metas = [dict(img_shape=shape) for shape in shapes]
    assert_equal(dets, labels, head.predict_by_feat(*outputs, batch_img_metas=metas), 40)
    assert dets[1, :, 2].max() == 60
    assert dets[0, :, 2].max() == 104


def test_proposals_of_an_rpn_head():
    """Boxes of one level do not suppress those of another."""
    head = build(RPNHead, dict(in_channels=8, feat_channels=8, anchor_generator=ANCHORS), min_bbox_size=0)
    outputs = outputs_of(head)
    dets, levels = ProposalPostProcessing(head)(outputs, sizes_of(outputs))
    expected = head.predict_by_feat(*outputs, batch_img_metas=[dict(img_shape=SIZE)] * 2)
    for rows, image in zip(dets, expected, strict=True):
        torch.testing.assert_close(rows, torch.cat([image.bboxes, image.scores.unsqueeze(1)], 1))
    assert set(levels.flatten().tolist()) == {0, 1, 2}


def test_masks_of_rtmdet_ins():
    head = build(RTMDetInsSepBNHead, dict(SMALL, **POINTS), mask_thr_binary=0.4)
    with torch.no_grad():
        for parameter in head.rtm_kernel.parameters():
            parameter *= 5  # masks that are neither empty nor full
    outputs = outputs_of(head)
    dets, labels, masks = InstancePostProcessing(head)(outputs, sizes_of(outputs))
    meta = dict(img_shape=SIZE, ori_shape=(36, 52), scale_factor=(2.0, 2.0))
    expected = head.predict_by_feat(*outputs, batch_img_metas=[meta] * 2, rescale=True)
    dets[..., :4] /= 2
    assert_equal(dets, labels, expected, 40)
    threshold = torch.tensor(0.4).logit().item()
    for logits, kinds, image in zip(masks, labels, expected, strict=True):
        resized = resize_masks(logits[kinds >= 0].detach().numpy(), 8, (2.0, 2.0), (36, 52), threshold)
        assert 0.05 < image.masks.float().mean() < 0.95
        assert (torch.from_numpy(resized) != image.masks).float().mean() < 1e-4


def test_no_detections():
    head = build(*HEADS['RetinaNet'], score_thr=1.0)
    assert assert_equals_mmdetection(head, outputs_of(head)) == [0, 0]


def test_images_of_a_batch_are_independent():
    head = build(*HEADS['RetinaNet'])
    outputs = outputs_of(head, batch_size=3)
    last = [[level[2:] for level in levels] for levels in outputs]
    together, apart = (PostProcessing(head)(x, sizes_of(x)) for x in (outputs, last))
    for all_of_them, alone in zip(together, apart, strict=True):
        torch.testing.assert_close(all_of_them[2:], alone)


def test_unsupported_heads_raise():
    gfl = GFLHead(**SMALL, anchor_generator=ONE, norm_cfg=None, test_cfg=ConfigDict(nms=dict(type='nms')))
    with pytest.raises(ConfigError, match='GFLHead has its own post-processing'):
        PostProcessing(gfl)
    for nms in (dict(type='soft_nms', iou_threshold=0.5), {}):
        with pytest.raises(ConfigError, match=r'test_cfg\.nms=.* cannot be exported'):
            PostProcessing(build(*HEADS['RetinaNet'], nms=nms))
    without = build(*HEADS['RetinaNet'])
    del without.test_cfg['max_per_img']
    for head in (without, *(build(*HEADS['RetinaNet'], max_per_img=number) for number in (None, -1))):
        with pytest.raises(ConfigError, match=r'test_cfg\.max_per_img=(None|-1): expected the number of rows'):
            PostProcessing(head)
