"""The hook for tests in mixed precision."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.structures import BaseDataElement, InstanceData
from torch import nn

from mmevm.engine.hooks import AutocastHook


class Model(nn.Module):
    """Return the dtypes of a detector under autocast."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def test_step(self, x):
        out = self.layer(x)
        self.computed = out.dtype
        instances = InstanceData(bboxes=out, labels=out.argmax(1))
        sample = BaseDataElement(scores=out.sum(1))
        sample.set_field(instances, 'pred_instances')
        return [sample]


class Head(nn.Linear):
    def forward(self, x):
        self.computed = super().forward(x)
        return (self.computed, [self.computed])


class Detector(nn.Module):
    def __init__(self):
        super().__init__()
        self.bbox_head = Head(4, 4)

    def test_step(self, x):
        boxes, (others,) = self.bbox_head(x)
        self.dtypes = boxes.dtype, others.dtype
        return [InstanceData(bboxes=boxes + 256)]


def test_boxes_are_computed_in_float32_from_the_outputs_of_heads():
    model, x = Detector(), torch.rand(3, 4)
    expected = model.bbox_head(x)[0] + 256
    AutocastHook().before_test(SimpleNamespace(model=model))
    (sample,) = model.test_step(x)
    assert model.bbox_head.computed.dtype == torch.bfloat16
    assert model.dtypes == (torch.float32, torch.float32)
    assert (sample.bboxes - expected).abs().max() < 0.02  # bfloat16 has steps of 2 here


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_predictions_are_computed_in_low_precision_and_returned_in_float32(dtype):
    model, x = Model(), torch.rand(3, 4)
    expected = model.layer(x)
    AutocastHook(dtype).before_test(SimpleNamespace(model=model))
    (sample,) = model.test_step(x)
    instances = sample.pred_instances
    assert model.computed == getattr(torch, dtype)
    assert [instances.bboxes.dtype, sample.scores.dtype, instances.labels.dtype] == [torch.float32] * 2 + [torch.int64]
    assert 0 < (instances.bboxes - expected).abs().max() < 0.02
