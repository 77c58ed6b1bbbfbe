import gc
import sys

import model_index
import pytest
from mmengine.logging import MMLogger
from mmengine.runner import set_random_seed

import mmevm  # noqa: F401 - registers the fallback operators before other modules import mmcv.ops

model_index.read_once()


@pytest.fixture(autouse=True)
def seed():
    """Make random numbers independent of the order of the tests."""
    set_random_seed(0)


@pytest.fixture(autouse=True)
def new_loggers():
    """Let no training get the logger of an earlier test, as one does that starts within the same second."""
    MMLogger._instance_dict.clear()


@pytest.fixture(autouse=True)
def exempt_modules_from_garbage_collection():
    """Otherwise each collection would go through all imported packages, which takes a second."""
    count = len(sys.modules)
    yield
    if len(sys.modules) > count + 100:
        gc.collect()
        gc.freeze()
