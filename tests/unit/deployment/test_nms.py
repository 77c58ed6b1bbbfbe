"""Non-maximum suppression of batches, against brute force and the operator of ONNX."""

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou
from versions import EXPORTS_ONNX

from mmevm.deployment.nms import nms


def brute_force(boxes, scores, threshold, count=1000):
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for image, (rows, values) in enumerate(zip(boxes.double(), scores, strict=True)):
        overlap, kept = box_iou(rows, rows), []
        for i in values.argsort(descending=True).tolist():
            if values[i] > 0 and all(overlap[i, j] <= threshold for j in kept):
                kept.append(i)
        keep[image, kept[:count]] = True
    return keep


def make(batch=3, count=60):
    corners = torch.rand(batch, count, 2) * 50
    scores = torch.rand(batch, count)
    scores[0, :20] = 0  # no candidates
    scores[1] = 0
    return torch.cat([corners, corners + 5 + torch.rand(batch, count, 2) * 20], -1), scores


@pytest.mark.parametrize(('threshold', 'count'), [(0.1, 60), (0.5, 60), (0.5, 7), (0.9, 60)])
def test_equals_brute_force_image_by_image(threshold, count):
    boxes, scores = make()
    keep, expected = nms(boxes, scores, threshold, count), brute_force(boxes, scores, threshold, count)
    assert (keep & (scores > 0)).equal(expected)
    assert 0 < expected.sum() < expected.numel()


def test_no_boxes():
    assert nms(torch.zeros(2, 0, 4), torch.zeros(2, 0), 0.5, 5).shape == (2, 0)


@pytest.mark.skipif(not EXPORTS_ONNX, reason='ONNX export needs torch 2.7')
def test_operator_of_onnx_keeps_the_same_boxes(tmp_path):
    """In ONNX Runtime and OpenVINO, for a batch size and a number of boxes other than those of the export."""
    pytest.importorskip('onnxscript')
    onnxruntime, openvino = pytest.importorskip('onnxruntime'), pytest.importorskip('openvino')
    from mmevm.deployment.nms import translation_table

    class Keep(torch.nn.Module):
        def forward(self, x):
            return nms(x[..., :4], x[..., 4], 0.5, 8)

    file = str(tmp_path / 'nms.onnx')
    torch.onnx.export(
        Keep().eval(), (torch.cat([*map(torch.atleast_3d, make(2, 5))], -1),), file, dynamo=True, verbose=False,
        dynamic_shapes=({0: 'batch', 1: 'boxes'},), custom_translation_table=translation_table(),
    )  # fmt: skip
    boxes, scores = make()
    x = torch.cat([boxes, scores.unsqueeze(-1)], -1).numpy()
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    compiled = openvino.Core().compile_model(file, 'CPU', dict(INFERENCE_PRECISION_HINT='f32'))
    expected = brute_force(boxes, scores, 0.5, 8).numpy()
    for keep in (session.run(None, {session.get_inputs()[0].name: x})[0], compiled(x)[0]):
        np.testing.assert_array_equal(keep.astype(bool) & (scores > 0).numpy(), expected)
