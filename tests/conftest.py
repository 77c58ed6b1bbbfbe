import pytest
from mmengine.runner import set_random_seed

import mmevm  # noqa: F401 - before anything that imports mmcv.ops, as in tools/


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in a test, whichever ran before it."""
    set_random_seed(0)
