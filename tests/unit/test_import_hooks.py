"""Import hooks, each in a process of its own and with a small package instead of mmpretrain."""

import os
import shutil

import pytest
from command_line import ROOT, succeed

HUB = """
calls = []

class ModelHub:
    @classmethod
    def register_model_index(cls, path, config_prefix=None):
        assert path.is_file() and (config_prefix / 'configs/classification').is_dir()
        calls.append(path)
"""


def run(code, *paths):
    """Run code where the first of the paths is the working directory."""
    return succeed('-c', code, cwd=paths[0], PYTHONPATH=os.pathsep.join(map(str, paths)))


@pytest.fixture
def fake_mmpretrain(tmp_path):
    apis = tmp_path / 'mmpretrain' / 'apis'
    apis.mkdir(parents=True)
    (apis.parent / '__init__.py').touch()
    (apis / '__init__.py').touch()
    (apis / 'model.py').write_text(HUB)
    return tmp_path


def test_importing_mmevm_imports_nothing_heavy():
    loaded = run('import sys, mmevm; print(*sys.modules)', ROOT).split()
    assert 'mmevm.model_hub' in loaded
    assert not {'mmpretrain', 'mmengine', 'mmcv', 'modelindex', 'torch', 'yaml'} & set(loaded)


@pytest.mark.slow
@pytest.mark.parametrize('imports', ['import mmevm, mmpretrain', 'import mmpretrain, mmevm'])
def test_models_are_listed_in_any_order_of_imports(imports):
    code = f"""
{imports}
assert len(mmpretrain.list_models('efficientvim*')) == 14
print(type(mmpretrain.get_model('efficientvim-m1_300e_in1k').backbone))
"""
    assert 'mmevm.models.efficientvim.EfficientViM' in run(code, ROOT)


def test_models_are_registered_once_after_reloads(fake_mmpretrain):
    code = """
import importlib, sys
import mmevm
from mmpretrain.apis import model
assert len(model.calls) == 1
mmevm.model_hub.register()
importlib.reload(mmevm)
importlib.reload(mmevm.model_hub).register()
assert len(model.calls) == 1
importlib.reload(model)  # an empty hub
assert len(model.calls) == 1
del sys.modules['mmpretrain.apis.model']
assert len(importlib.import_module('mmpretrain.apis.model').calls) == 1
"""
    run(code, fake_mmpretrain, ROOT)


def test_hooked_module_has_its_usual_loader_and_source(fake_mmpretrain):
    code = """
import inspect
{}
from mmpretrain.apis import model
print(type(model.__loader__), type(model.__spec__.loader), model.__spec__.origin, inspect.getsource(model))
"""
    with_mmevm, without = (run(code.format(line), fake_mmpretrain, ROOT) for line in ('import mmevm', ''))
    assert with_mmevm == without


@pytest.mark.parametrize('source', ['raise ImportError("no modelindex")', None])
def test_import_errors_of_mmpretrain_are_unchanged(fake_mmpretrain, source):
    path = fake_mmpretrain / 'mmpretrain/apis/model.py'
    path.unlink() if source is None else path.write_text(source)
    code = """
import mmevm
try:
    import mmpretrain.apis.model
except ImportError as error:
    print(error)
"""
    expected = "No module named 'mmpretrain.apis.model'" if source is None else 'no modelindex'
    assert run(code, fake_mmpretrain, ROOT).strip() == expected


def test_missing_index_is_a_warning(fake_mmpretrain):
    shutil.copytree(ROOT / 'mmevm', fake_mmpretrain / 'mmevm', ignore=shutil.ignore_patterns('__pycache__'))
    printed = run('import mmevm, mmpretrain.apis.model as m; assert not m.calls', fake_mmpretrain)
    assert f'{fake_mmpretrain / "model-index.yml"} does not exist' in printed
    assert 'Reinstall mmevm' in printed


def test_name_of_another_plugin_is_a_warning(fake_mmpretrain):
    hub = fake_mmpretrain / 'mmpretrain/apis/model.py'
    hub.write_text(
        """
class ModelHub:
    @classmethod
    def register_model_index(cls, path, config_prefix):
        raise ValueError('The model name efficientvim-m1 is conflict')
"""
    )
    printed = run('import mmevm, mmpretrain.apis.model; print("loaded")', fake_mmpretrain, ROOT)
    assert 'MMPretrain cannot list all models of mmevm: The model name efficientvim-m1' in printed
    assert 'loaded' in printed
