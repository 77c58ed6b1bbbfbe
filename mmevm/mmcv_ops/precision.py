"""Half precision goes in and out; what lies between is computed in single precision."""

import torch
from torch import Tensor


def widen(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it was that already.

    torchvision's operators have no bfloat16 and on CPU not always float16, and box coordinates need more than either.
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
