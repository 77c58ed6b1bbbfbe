"""Features that older PyTorch versions do not have, to skip tests."""

import pytest
import torch
from torch.torch_version import TorchVersion

VERSION = TorchVersion(torch.__version__)

HALF_ON_CPU = VERSION >= '2.3'  # convolution, normalization and matmul in float16
needs_half = pytest.mark.skipif(not HALF_ON_CPU, reason='needs torch 2.3 for float16 on a CPU')
EXPORTS_ONNX = VERSION >= '2.7'  # as in mmevm.deployment.export
