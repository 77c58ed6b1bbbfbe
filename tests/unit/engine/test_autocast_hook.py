"""The hook for tests in mixed precision."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.structures import BaseDataElement, InstanceData
from torch import nn

from mmevm.registry import HOOKS


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


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_predictions_are_computed_in_low_precision_and_returned_in_float32(dtype):
    model, x = Model(), torch.rand(3, 4)
    expected = model.layer(x)
    HOOKS.build(dict(type='AutocastHook', dtype=dtype)).before_test(SimpleNamespace(model=model))
    (sample,) = model.test_step(x)
    instances = sample.pred_instances
    assert model.computed == getattr(torch, dtype)
    assert [instances.bboxes.dtype, sample.scores.dtype, instances.labels.dtype] == [torch.float32] * 2 + [torch.int64]
    assert 0 < (instances.bboxes - expected).abs().max() < 0.02
