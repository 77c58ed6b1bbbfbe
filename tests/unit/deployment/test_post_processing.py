"""Exportable post-processing returns the boxes of MMDetection's own, image by image."""

import pytest
import torch
from mmdet.models.dense_heads import ATSSHead, FCOSHead, GFLHead, RetinaHead, RTMDetSepBNHead
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope

from mmevm.deployment.post_processing import PostProcessing, compare_detections
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
    dets, labels = PostProcessing(head)(outputs, SIZE)
    expected = head.predict_by_feat(*outputs, batch_img_metas=[dict(img_shape=SIZE)] * len(dets))
    assert dets.shape == (len(expected), head.test_cfg.max_per_img, 5)
    for rows, kinds, image in zip(dets, labels, expected, strict=True):
        count = len(image.scores)
        torch.testing.assert_close(rows[:count, :4], image.bboxes)
        torch.testing.assert_close(rows[:count, 4], image.scores)
        assert kinds[:count].tolist() == image.labels.tolist()
        assert not rows[count:, 4].any()
        assert set(kinds[count:].tolist()) <= {-1}
    return [len(image.scores) for image in expected]


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
        PostProcessing(limited)(outputs, SIZE), PostProcessing(unlimited)(outputs, SIZE), strict=True
    ):
        assert one.equal(other)


def test_boxes_are_clipped_as_by_the_box_coder():
    inside = build(*HEADS['RetinaNet'])
    coder = dict(type='DeltaXYWHBBoxCoder', clip_border=False)
    across = build(RetinaHead, dict(HEADS['RetinaNet'][1], bbox_coder=coder))
    outputs = outputs_of(inside)
    assert_equals_mmdetection(across, outputs)
    dets, _ = PostProcessing(across)(outputs, SIZE)
    assert dets.min() < -1
    assert PostProcessing(inside)(outputs, SIZE)[0].min() == 0


def test_no_detections():
    head = build(*HEADS['RetinaNet'], score_thr=1.0)
    assert assert_equals_mmdetection(head, outputs_of(head)) == [0, 0]


def test_images_of_a_batch_are_independent():
    head = build(*HEADS['RetinaNet'])
    outputs = outputs_of(head, batch_size=3)
    last = [[level[2:] for level in levels] for levels in outputs]
    for all_of_them, alone in zip(PostProcessing(head)(outputs, SIZE), PostProcessing(head)(last, SIZE), strict=True):
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


def detections(count=40):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, count, 2, generator=generator) * 100
    dets = torch.cat([corners, corners + 20, torch.rand(2, count, 1, generator=generator)], -1)
    return dets, torch.randint(3, (2, count), generator=generator)


def test_compare_detections():
    dets, labels = detections()
    assert compare_detections((dets, labels), (dets, labels)) == [0, 0]
    order = torch.randperm(40)
    assert compare_detections((dets[:, order], labels[:, order]), (dets, labels)) == [0, 0]
    largest = dets[..., :4].max().item()
    moved = dets + torch.tensor([0, 0, 0.02 * largest, 0, 0])
    assert compare_detections((moved, labels), (dets, labels)) == [pytest.approx(0.02, rel=1e-4)] * 2
    assert compare_detections((dets * torch.tensor([1, 1, 1, 1, 0.9]), labels), (dets, labels))[0] == pytest.approx(
        0.1, rel=0.1
    )


@pytest.mark.parametrize('lost', [2, 8])
def test_compare_detections_accepts_a_few_without_counterpart(lost):
    dets, labels = detections()
    fewer = labels.clone()
    fewer[0, :lost] = -1
    others = labels.clone()
    others[0, :lost] = 3
    for changed in (fewer, others):
        for one, other in ((changed, labels), (labels, changed)):
            difference, again = compare_detections((dets, one), (dets, other))
            assert difference == again
            assert difference == 0 if lost == 2 else difference > 0.02


def test_compare_detections_with_empty_or_nan_detections():
    dets, labels = detections()
    nothing = torch.full_like(labels, -1)
    assert compare_detections((dets, nothing), (dets, nothing)) == [0, 0]
    assert compare_detections((dets, labels), (dets, nothing)) == [float('inf')] * 2
    assert compare_detections((dets, nothing), (dets, labels)) == [float('inf')] * 2
    assert compare_detections((dets * float('nan'), labels), (dets, labels)) == [float('inf')] * 2
