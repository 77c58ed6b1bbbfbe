import cv2
import numpy as np
import pytest
from tiny_models import write_classifier, write_detector


@pytest.fixture(scope='session')
def detector(tmp_path_factory):
    """Config and checkpoint of a Mask R-CNN."""
    return write_detector(tmp_path_factory.mktemp('detector'), dataset_meta=dict(classes=('disc', 'box')))


@pytest.fixture(scope='session')
def classifier(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp('classifier'))


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    """Two images of different sizes in a folder."""
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for name, (height, width) in {'a.png': (80, 96), 'b.jpg': (96, 64)}.items():
        image = rng.integers(0, 255, (8, 8, 3), np.uint8)
        cv2.imwrite(str(folder / name), cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC))
    return folder
