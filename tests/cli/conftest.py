import pytest
import tiny_data


@pytest.fixture(scope='session')
def shapes(tmp_path_factory):
    """The folder of a small COCO dataset with masks."""
    return tiny_data.make_shapes(tmp_path_factory.mktemp('shapes'))


@pytest.fixture
def classifier(tmp_path):
    """The config of a classifier of two classes."""
    return tiny_data.make_classifier(tmp_path)
