"""Import mmevm in processes whose installed packages are only metadata."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def install(site, *names):
    for name in names:
        info = site / f'{name.replace("-", "_")}-2.1.0.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 2.1.0\n')


def provide(site, *packages):
    for name in packages:
        (site / name).mkdir()
        (site / name / '__init__.py').touch()


def run(site, *arguments):
    environment = os.environ | {'PYTHONPATH': os.pathsep.join([str(site), str(ROOT)])}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def import_mmevm(site):
    return run(site, '-S', '-c', 'import mmevm')  # -S: without the packages that are really installed


@pytest.mark.parametrize(
    'names',
    [
        ['onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmpretrain', 'onedl-mmsegmentation'],
        ['mmengine', 'mmcv', 'mmdet', 'mmpretrain', 'mmsegmentation'],
        ['mmengine-lite', 'mmcv-lite'],
    ],
)
def test_one_distribution(names, tmp_path):
    install(tmp_path, *names)
    provide(tmp_path, 'mmengine', 'mmcv')
    result = import_mmevm(tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(('there', 'missing'), [([], 'mmengine, mmcv'), (['mmengine'], 'mmcv'), (['mmcv'], 'mmengine')])
def test_missing_packages(there, missing, tmp_path):
    install(tmp_path, 'torch', *(f'onedl-{name}' for name in there))
    provide(tmp_path, *there)
    result = import_mmevm(tmp_path)
    assert result.returncode == 1
    message = result.stderr.splitlines()[-1]
    assert f'not installed: {missing}. ' in message
    assert "pip install -e '.[onedl]'" in message
    assert "pip install -e '.[openmmlab]'" in message


@pytest.mark.parametrize(
    'names',
    [
        ['onedl-mmengine', 'onedl-mmcv', 'mmengine', 'mmcv'],
        ['onedl-mmengine', 'onedl-mmcv', 'mmcv-lite'],
        ['mmengine', 'mmcv', 'onedl-mmcv'],
        ['onedl-mmengine', 'onedl-mmcv', 'mmdet'],
        ['onedl-mmengine', 'onedl-mmcv', 'mmsegmentation'],
        ['mmengine', 'mmcv', 'onedl-mmsegmentation'],
        ['mmengine', 'mmcv', 'onedl-mmpretrain'],
        ['onedl-mmengine', 'mmengine-lite'],
    ],
)
def test_both_distributions(names, tmp_path):
    install(tmp_path, *names)
    result = import_mmevm(tmp_path)
    assert result.returncode == 1
    message = result.stderr.splitlines()[-1]
    assert 'Both distributions' in message
    assert all(repr(name) in message for name in names)
    assert 'pip uninstall' in message
    assert "pip install -e '.[onedl]' or pip install -e '.[openmmlab]'" in message


@pytest.mark.parametrize(
    ('there', 'packages'), [('onedl-mmcv', 'onedl-mmsegmentation'), ('mmcv', 'mmsegmentation ftfy regex')]
)
def test_missing_segmentation(there, packages, tmp_path):
    install(tmp_path, there)
    provide(tmp_path, 'mmengine', 'mmcv', 'ftfy')
    result = run(tmp_path, '-S', '-c', 'from mmevm.distributions import check_segmentation; check_segmentation()')
    message = result.stderr.splitlines()[-1]
    assert f'needs MMSegmentation; not installed: mmseg, regex. Run pip install {packages}, or' in message
    key = 'onedl' if there.startswith('onedl') else 'openmmlab'
    assert f"pip install -e '.[{key},seg-{key}]'" in message


def test_error_is_raised_when_a_config_is_built(tmp_path):
    """MMEngine's registry would ignore an ImportError and report that EfficientViM is not registered."""
    install(tmp_path, 'onedl-mmcv', 'mmcv-lite')
    code = "from mmengine.registry import MODELS; MODELS.build(dict(type='mmevm.EfficientViM', arch='m1'))"
    result = run(tmp_path, '-c', code)
    assert result.returncode == 1
    assert 'Both distributions' in result.stderr.splitlines()[-1]
    assert 'is not in the' not in result.stderr
