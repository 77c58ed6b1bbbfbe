"""A wheel and an editable install, each in a fresh environment with the command line that a user runs."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import timm
import torch
from command_line import ENVIRONMENT, ROOT

from mmevm.__main__ import COMMANDS

pytestmark = pytest.mark.slow
SHORT = [
    *('train_cfg.max_iters=2', 'train_cfg.val_interval=2', 'train_dataloader.batch_size=2'),
    *('model.train_cfg.rcnn.sampler.num=32', 'model.test_cfg.rpn.max_per_img=10'),
]


@pytest.fixture(scope='module', params=['wheel', 'editable'])
def installed(request, tmp_path_factory):
    """Install a copy of the repository. Return the folder of configs and tools, and a function that runs Python."""
    folder = tmp_path_factory.mktemp(request.param)
    source, environment = folder / 'source', folder / 'environment'
    ignore = shutil.ignore_patterns('.*', '__pycache__', 'work_dirs', 'build', '*.egg-info')
    shutil.copytree(ROOT, source, ignore=ignore)
    venv.create(environment)
    (site,) = environment.glob('lib/python*/site-packages')
    # All installed packages, but none of their .pth files, of which one is that of mmevm in development.
    packages = [path for path in sys.path if Path(path).name == 'site-packages']
    (site / 'packages.pth').write_text('\n'.join(packages))

    def run(*command, cwd):
        variables = {name: value for name, value in (os.environ | ENVIRONMENT).items() if name != 'PYTHONPATH'}
        result = subprocess.run(
            list(map(str, command)), cwd=cwd, env=variables, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr

    python = environment / 'bin/python'
    pip = [sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps', '--no-build-isolation']
    editable = ['--editable'] if request.param == 'editable' else []
    run(*pip, '--ignore-installed', *editable, source, cwd=folder)
    if not editable:  # pip has built a wheel
        shutil.rmtree(source)
    return source if editable else site / 'mmevm/.mim', lambda *arguments, cwd: run(python, *arguments, cwd=cwd)


@pytest.fixture(scope='module')
def trained(installed, shapes, tmp_path_factory):
    """The folder of a config that has one of mmevm as its base, and of its training."""
    _, python = installed
    folder = tmp_path_factory.mktemp('trained')
    (folder / 'own.py').write_text("""
_base_ = 'mmevm::demo/maskrcnn_evm_m1_shapes.py'
arch = dict(_delete_=True, embed_dims=(16, 24, 32), depths=(1, 1, 1), state_dims=(4, 4, 4))
model = dict(backbone=dict(arch=arch), neck=dict(in_channels=[16, 24, 32]))
""")
    data = [
        *(f'{split}_dataloader.dataset.data_root={shapes}' for split in ('train', 'val', 'test')),
        *(f'{split}_evaluator.ann_file={shapes}/annotations/instances_val.json' for split in ('val', 'test')),
    ]
    options = ['--work-dir', 'work', '--cfg-options', *SHORT, *data]
    output = python('-m', 'mmevm', 'train', 'own.py', *options, cwd=folder)
    assert 'coco/bbox_mAP' in output
    assert "type='mmevm.EfficientViM'" in (folder / 'work/own.py').read_text()
    return folder, options


@pytest.mark.parametrize('installed', ['wheel'], indirect=True, scope='module')
def test_commands_without_a_clone(installed, trained, shapes):
    _, python = installed
    folder, options = trained
    called = {'train'}

    def call(command, *arguments):
        called.add(command)
        return python('-m', 'mmevm', command, *arguments, cwd=folder)

    assert 'coco/segm_mAP' in call('test', 'own.py', 'work/iter_2.pth', *options)
    image = min((shapes / 'val').iterdir())
    call('infer', 'own.py', 'work/iter_2.pth', image, '--out', 'found', '--device', 'cpu')
    assert (folder / 'found/vis' / image.name).exists()
    call('export', 'own.py', 'work/iter_2.pth', 'backbone.onnx', '--part', 'backbone')
    assert (folder / 'backbone.onnx').exists()
    torch.save(timm.create_model('efficientvim_m1').state_dict(), folder / 'timm.pth')
    call('convert', 'timm.pth', 'converted.pth')
    assert torch.load(folder / 'converted.pth')['state_dict']
    quick = ['--resolution', 32, '--batch-size', 1, '--rounds', 2, '--no-memory', '--device', 'cpu']
    assert 'ms/image' in call('benchmark', '--models', 'm1', *quick)
    assert 'backbone.stages' in call('flops', 'mmevm::classification/efficientvim-m1_300e_in1k.py')
    for command in set(COMMANDS) - called:
        assert 'usage: ' in call(command, '--help')


def test_configs_are_found_by_name(installed, tmp_path):
    root, python = installed
    (tmp_path / 'own.py').write_text("_base_ = 'mmevm::demo/maskrcnn_evm_m1_shapes.py'")
    (tmp_path / 'list.py').write_text("""
import mmevm, mmpretrain
from mmengine import Config
from mmpretrain.apis import ModelHub
print('base config:', Config.fromfile('own.py').model.backbone.type)
for name in mmpretrain.list_models('efficientvim*'):
    print('listed', ModelHub.get(name).config.filename)
print(type(mmpretrain.get_model('efficientvim-m1_300e_in1k')))
""")
    output = python('list.py', cwd=tmp_path)
    listed = {line.split()[1] for line in output.splitlines() if line.startswith('listed')}
    assert listed == {str(path) for path in (root / 'configs/classification').glob('*.py')}
    assert 'DistillationClassifier' in output
    assert 'base config: mmevm.EfficientViM' in output


def test_same_files_as_in_the_repository(installed):
    root, _ = installed
    for folder in ('configs', 'tools'):
        files, expected = (
            {path.relative_to(base / folder) for path in (base / folder).rglob('*.*') if path.suffix != '.pyc'}
            for base in (root, ROOT)
        )
        assert files == expected


def test_folder_of_the_same_name_does_not_shadow_mmevm(installed, tmp_path):
    """As in the parent folder of a clone."""
    root, python = installed
    (tmp_path / 'mmevm').mkdir()
    (tmp_path / 'find.py').write_text('from importlib.util import find_spec; print(find_spec("mmevm").origin)')
    package = root.parent if root.name == '.mim' else root / 'mmevm'
    assert python('find.py', cwd=tmp_path).strip() == str(package / '__init__.py')
