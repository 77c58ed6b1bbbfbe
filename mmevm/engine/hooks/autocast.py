"""Evaluation in mixed precision."""

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.structures import BaseDataElement

from mmevm.registry import HOOKS


@HOOKS.register_module()
class AutocastHook(Hook):
    """Test a model under ``torch.autocast``, and convert its predictions to float32.

    MMEngine's ``test_cfg.fp16`` does not convert them, and MMDetection's metrics do not accept bfloat16.

    Args:
        dtype: 'bfloat16' or 'float16'.
    """

    def __init__(self, dtype: str = 'bfloat16') -> None:
        self.dtype = getattr(torch, dtype)

    def before_test(self, runner: Any) -> None:
        """Wrap ``test_step`` of the model."""
        test_step = runner.model.test_step
        device = next(runner.model.parameters()).device.type

        def test_step_in_mixed_precision(data: Any) -> Any:
            with torch.autocast(device, self.dtype):
                samples = test_step(data)
            for sample in samples:
                _to_float(sample)
            return samples

        runner.model.test_step = test_step_in_mixed_precision


def _to_float(element: BaseDataElement) -> None:
    for name, value in element.items():
        if isinstance(value, BaseDataElement):
            _to_float(value)
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            element.set_data({name: value.float()})
