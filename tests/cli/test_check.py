"""Checks of tools/train.py and tools/test.py in processes of their own."""

import re
from pprint import pformat

import pytest
from command_line import ROOT, error_line, run, succeed
from mmengine.config import Config

TRAIN, TEST = ROOT / 'tools/train.py', ROOT / 'tools/test.py'
DEMO = ROOT / 'configs/demo/maskrcnn_evm_m1_shapes.py'
SHORT = [
    *('train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'train_dataloader.batch_size=2'),
    *('train_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False'),
    *('val_dataloader.num_workers=0', 'val_dataloader.persistent_workers=False'),
    *('test_dataloader.num_workers=0', 'test_dataloader.persistent_workers=False'),
]


@pytest.fixture(scope='module')
def checkpoint(shapes, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('training')
    succeed(TRAIN, DEMO, '--data-root', shapes, '--work-dir', work_dir, '--cfg-options', *SHORT, cwd=work_dir)
    return work_dir / 'iter_2.pth'


@pytest.mark.slow
def test_check_training(shapes, tmp_path):
    result = run(TRAIN, DEMO, '--data-root', shapes, '--check', '--cfg-options', *SHORT, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    summary = result.stdout.partition('Check passed.')[2]
    for part in (
        'train_dataloader.dataset (CocoDataset): ',
        'per class: shape ',
        'returns 128, 192, 320 channels',
    ):
        assert part in summary
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_check_evaluation(shapes, tmp_path, checkpoint):
    result = run(TEST, DEMO, checkpoint, '--data-root', shapes, '--check', '--cfg-options', *SHORT, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    summary = result.stdout.partition('Check passed.')[2]
    assert 'test_dataloader.dataset (CocoDataset): 2 images' in summary
    assert f'weights: load_from {checkpoint}' in summary
    assert list(tmp_path.iterdir()) == []
    result = run(TEST, DEMO, 'none.pth', '--data-root', shapes, '--check', '--cfg-options', *SHORT, cwd=tmp_path)
    assert error_line(result).startswith('CheckpointError: ')


@pytest.mark.slow
def test_explained_error_is_the_last_line(shapes, tmp_path):
    options = [*SHORT, 'model.neck.in_channels=[1,2,3]']
    result = run(TRAIN, DEMO, '--data-root', shapes, '--work-dir', 'work', '--cfg-options', *options, cwd=tmp_path)
    assert error_line(result).startswith(
        'ConfigError: model.neck.in_channels=[1, 2, 3] does not match the output channels'
    )


CLASSES = {
    'mmdet.models': ['MaskRCNN', 'RPNHead', 'StandardRoIHead', 'Shared2FCBBoxHead', 'FCNMaskHead'],
    'mmdet.datasets': ['CocoDataset'],
    'mmdet.evaluation': ['CocoMetric'],
    'mmengine.runner': ['IterBasedTrainLoop'],
    'mmengine.hooks': ['CheckpointHook', 'LoggerHook'],
    'torch.optim': ['AdamW'],
}


@pytest.fixture
def python_config(tmp_path):
    """The config of the demo with classes instead of names."""
    cfg = Config.fromfile(DEMO).to_dict()
    text = '\n'.join(f'{key} = {pformat(value)}' for key, value in cfg.items())
    for names in CLASSES.values():
        for name in names:
            assert f"'type': '{name}'" in text
            text = text.replace(f"'type': '{name}'", f"'type': {name}")
    imports = [f'from {module} import {", ".join(names)}' for module, names in CLASSES.items()]
    path = tmp_path / 'python_config.py'
    path.write_text('\n'.join([*imports, text]))
    return path


@pytest.mark.slow
def test_python_config(shapes, tmp_path, python_config):
    """Train with the resumable loop and write results with ``--format-only``."""
    arguments = ['--data-root', shapes, '--work-dir', 'work']
    output = succeed(TRAIN, python_config, *arguments, '--cfg-options', *SHORT, cwd=tmp_path)
    assert 'Saving checkpoint at 2 iterations' in output
    dumped = (tmp_path / 'work/python_config.py').read_text()
    assert 'ResumableIterLoop' in dumped
    assert 'mmevm.atomic' in dumped
    format_only = ['--format-only', tmp_path / 'results', '--cfg-options', *SHORT]
    succeed(TEST, python_config, 'work/iter_2.pth', *arguments, *format_only, cwd=tmp_path)
    assert (tmp_path / 'results.bbox.json').exists()


BLOCKED = """
import runpy, sys
sys.modules['mmdet'] = None  # as if it were not installed
from importlib import util
find_spec = util.find_spec
util.find_spec = lambda name, *args: None if name.split('.')[0] == 'mmdet' else find_spec(name, *args)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.slow
def test_classification_without_mmdetection(tmp_path, classifier):
    for loader in (classifier.train_dataloader, classifier.val_dataloader, classifier.test_dataloader):
        loader.batch_size = 2
    classifier.train_cfg.update(max_epochs=1)
    classifier.dump(tmp_path / 'config.py')
    arguments = ['--work-dir', 'work']
    succeed('-c', BLOCKED, TRAIN, 'config.py', *arguments, cwd=tmp_path)
    (checkpoint,) = (tmp_path / 'work').glob('*.pth')
    output = succeed('-c', BLOCKED, TEST, 'config.py', checkpoint, *arguments, cwd=tmp_path)
    assert re.search(r'accuracy/top1: \d', output)


@pytest.mark.slow
def test_imports_print_nothing(tmp_path):
    """mmengine, mmdet and mmpretrain print notices about optional packages."""
    script = tmp_path / 'tool.py'
    script.write_text("""
import importlib
from mmevm.cli import run

def main():
    for name in ('mmdet.datasets', 'mmdet.evaluation', 'mmpretrain.datasets'):
        importlib.import_module(name)
    import mmengine.logging
    mmengine.logging.print_log('printed as before')

run(main)
""")
    lines = succeed(script, cwd=tmp_path).splitlines()
    assert [line for line in lines if 'fallback operators' not in line] == ['printed as before']
