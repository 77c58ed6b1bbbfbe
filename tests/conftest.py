import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import mmevm  # noqa: F401 - before anything that imports mmcv.ops, as in tools/

sys.path.insert(0, str(Path(__file__).parent))  # helpers shared by test files, such as randomise.py


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in a test, whichever ran before it."""
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(0)
