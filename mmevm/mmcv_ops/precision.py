"""Computation in single precision for inputs in half precision."""

import torch
from torch import Tensor


def widen(tensor: Tensor) -> Tensor:
    """Convert half precision to float32; float32 and float64 stay as they are.

    torchvision's operators do not support bfloat16 and, on CPU, not always float16. Box coordinates need more precision
    than either of them.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
