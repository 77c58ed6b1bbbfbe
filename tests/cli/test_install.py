"""A wheel and an editable install, each with the command line that a user runs."""

import os
import shutil
import sysconfig

import pytest
from command_line import ROOT, succeed

pytestmark = pytest.mark.slow
SHORT = [
    *('train_cfg.max_iters=1', 'train_cfg.val_interval=1', 'train_dataloader.batch_size=2'),
    *('model.train_cfg.rcnn.sampler.num=32', 'model.test_cfg.rpn.max_per_img=10'),
]


@pytest.fixture(scope='module', params=['wheel', 'editable'])
def installed(request, tmp_path_factory):
    """Install a copy of the repository. Return the copy, the site folder and a function that runs Python with it."""
    folder = tmp_path_factory.mktemp(request.param)
    source, site = folder / 'source', folder / 'site'
    ignore = shutil.ignore_patterns('.*', '__pycache__', 'work_dirs', 'build', '*.egg-info')
    shutil.copytree(ROOT, source, ignore=ignore)
    editable = ['--editable'] if request.param == 'editable' else []
    pip = ['-m', 'pip', 'install', '--no-deps', '--no-build-isolation', '--target', site, *editable, source]
    succeed(*pip, cwd=folder)
    if not editable:
        shutil.rmtree(source)

    def python(*arguments, cwd):
        # -S and PYTHONPATH: all installed packages, but no .pth file except those of the new site folder.
        code = (
            f'import runpy, site, sys; site.addsitedir({str(site)!r}); sys.argv = sys.argv[1:]; '
            "runpy.run_path(sys.argv[0], run_name='__main__')"
        )
        packages = {sysconfig.get_path(name) for name in ('purelib', 'platlib')}
        path = os.pathsep.join([*([] if editable else [str(site)]), *packages])
        return succeed('-S', '-c', code, *arguments, cwd=cwd, PYTHONPATH=path)

    return source if editable else site / 'mmevm/.mim', python


def test_base_config_by_name(installed, shapes, tmp_path):
    root, python = installed
    (tmp_path / 'own.py').write_text("_base_ = 'mmevm::demo/maskrcnn_evm_m1_shapes.py'\n")
    data = [
        *(f'{split}_dataloader.dataset.data_root={shapes}' for split in ('train', 'val', 'test')),
        *(f'{split}_evaluator.ann_file={shapes}/annotations/instances_val.json' for split in ('val', 'test')),
    ]
    output = python(
        root / 'tools/train.py', 'own.py', '--work-dir', 'work', '--cfg-options', *SHORT, *data, cwd=tmp_path
    )
    assert 'coco/bbox_mAP' in output
    assert "type='mmevm.EfficientViM'" in (tmp_path / 'work/own.py').read_text()


def test_config_by_name(installed, tmp_path):
    root, python = installed
    output = python(root / 'tools/get_flops.py', 'mmevm::classification/efficientvim-m1_300e_in1k.py', cwd=tmp_path)
    assert 'backbone.stages' in output


def test_model_hub_lists_installed_configs(installed, tmp_path):
    root, python = installed
    (tmp_path / 'list.py').write_text("""
import mmevm, mmpretrain
from mmpretrain.apis import ModelHub
for name in mmpretrain.list_models('efficientvim*'):
    print('listed', ModelHub.get(name).config.filename)
print(type(mmpretrain.get_model('efficientvim-m1_300e_in1k')))
""")
    output = python('list.py', cwd=tmp_path)
    listed = {line.split()[1] for line in output.splitlines() if line.startswith('listed')}
    assert listed == {str(path) for path in (root / 'configs/classification').glob('*.py')}
    assert 'DistillationClassifier' in output


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
    _, python = installed
    (tmp_path / 'mmevm').mkdir()
    (tmp_path / 'find.py').write_text('from importlib.util import find_spec; print(find_spec("mmevm").origin)')
    assert python('find.py', cwd=tmp_path).strip().endswith('mmevm/__init__.py')
