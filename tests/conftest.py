import model_index
import pytest
from mmengine.runner import set_random_seed

import mmevm  # noqa: F401 - registers the fallback operators before other modules import mmcv.ops

model_index.read_once()


@pytest.fixture(autouse=True)
def seed():
    """Make random numbers independent of the order of the tests."""
    set_random_seed(0)
