import sys
from pathlib import Path

import pytest
import torch

import mmevm  # noqa: F401 - before anything that imports mmcv.ops, as in tools/

sys.path.insert(0, str(Path(__file__).parent))  # helpers shared by test files, such as randomise.py


def pytest_collection_modifyitems(items):
    """Begin with the longest files, so that at the end none of two processes is left alone with one."""
    slow = {item.path for item in items if item.get_closest_marker('slow')}
    longest = [Path(__file__).parent / name for name in ('test_training/test_killed.py', 'test_processes.py')]
    items.sort(key=lambda item: (item.path not in longest, item.path not in slow))


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in a test, whichever ran before it."""
    torch.manual_seed(0)
