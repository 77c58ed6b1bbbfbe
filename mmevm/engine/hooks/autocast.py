"""Evaluation in mixed precision."""

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.structures import BaseDataElement
from torch import nn

from mmevm.registry import HOOKS


@HOOKS.register_module()
class AutocastHook(Hook):
    """Test a model under ``torch.autocast``, but compute boxes and scores from the outputs of its heads in float32.

    MMEngine's ``test_cfg.fp16`` leaves all in the low precision: coordinates of more than 256 pixels are rounded to two
    pixels in bfloat16, and MMDetection's metrics do not accept it.

    Args:
        dtype: 'bfloat16' or 'float16'.
    """

    def __init__(self, dtype: str = 'bfloat16') -> None:
        self.dtype = getattr(torch, dtype)

    def before_test(self, runner: Any) -> None:
        """Wrap ``test_step`` of the model."""
        test_step = runner.model.test_step
        device = next(runner.model.parameters()).device.type
        for name, module in runner.model.named_modules():
            if name.endswith('head'):
                module.register_forward_hook(_convert_outputs)

        def test_step_in_mixed_precision(data: Any) -> Any:
            with torch.autocast(device, self.dtype):
                samples = test_step(data)
            for sample in samples:
                _to_float(sample)
            return samples

        runner.model.test_step = test_step_in_mixed_precision


def _convert_outputs(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    if isinstance(outputs, (list, tuple)):
        return type(outputs)(_convert_outputs(module, inputs, output) for output in outputs)
    is_float = isinstance(outputs, torch.Tensor) and outputs.is_floating_point()
    return outputs.float() if is_float else outputs


def _to_float(element: BaseDataElement) -> None:
    for name, value in element.items():
        if isinstance(value, BaseDataElement):
            _to_float(value)
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            element.set_data({name: value.float()})
