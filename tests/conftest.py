import sys
from pathlib import Path

import pytest
from mmengine.runner import set_random_seed

import mmevm  # noqa: F401 - before anything that imports mmcv.ops, as in tools/

sys.path.insert(0, str(Path(__file__).parent))  # helpers shared by test files, such as randomise.py


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in a test, whichever ran before it."""
    set_random_seed(0)
