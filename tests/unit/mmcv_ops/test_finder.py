"""Tests of the import hook, mostly in separate processes, because imported modules stay imported."""

import os
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import mmevm
from mmevm.mmcv_ops import ext, register
from mmevm.mmcv_ops.finder import FallbackFinder

ROOT = Path(mmevm.__file__).parents[1]


def run(code: str, *paths: Path) -> str:
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(map(str, [*paths, ROOT]))}
    result = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.fixture
def other_mmcv(tmp_path: Path) -> Path:
    """Return a folder with an empty package ``mmcv``, to put first on Python's path."""
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv' / '__init__.py').touch()
    return tmp_path


def test_ext_file_in_mmcv_has_priority(other_mmcv: Path) -> None:
    (other_mmcv / 'mmcv' / '_ext.py').write_text('origin = "in mmcv"')
    assert 'in mmcv' in run('import mmevm, mmcv._ext; print(mmcv._ext.origin)', other_mmcv)


def test_compiled_operators_have_priority(other_mmcv: Path) -> None:
    compiled = other_mmcv / 'mmcv' / f'_ext{EXTENSION_SUFFIXES[0]}'
    compiled.touch()
    code = 'import mmevm, importlib.util; print(importlib.util.find_spec("mmcv._ext").origin)'
    assert str(compiled) in run(code, other_mmcv)


def test_finder_is_registered_once_and_finds_one_module(other_mmcv: Path) -> None:
    code = """
import importlib.util, sys
import mmevm
from mmevm.mmcv_ops import register
before = list(sys.meta_path)
register()
assert sys.meta_path == before
spec = importlib.util.find_spec('mmcv._ext')
assert spec.loader is not None and spec.origin.endswith('ext.py'), spec
for name in ('mmcv.other', 'mmcv._ext2', 'other._ext', '_ext'):
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        found = None
    assert found is None, name
"""
    run(code, other_mmcv)


def test_finder_returns_spec_of_ext_file() -> None:
    spec = FallbackFinder.find_spec('mmcv._ext', ['anywhere'])
    assert (spec.name, spec.origin) == ('mmcv._ext', ext.__file__)
    assert FallbackFinder.find_spec('mmcv.ops', ['anywhere']) is None


def test_register_twice_adds_one_finder(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [finder for finder in sys.meta_path if finder is not FallbackFinder]
    monkeypatch.setattr(sys, 'meta_path', others.copy())
    for _ in range(2):
        register()
        assert sys.meta_path == [*others, FallbackFinder]


def test_register_imports_nothing_heavy() -> None:
    loaded = run('import sys; from mmevm.mmcv_ops import register; register(); print(*sys.modules)').split()
    assert 'mmevm.mmcv_ops.finder' in loaded
    assert not {'mmcv', 'mmdet', 'torch', 'torchvision', 'mmevm.mmcv_ops.ext'} & set(loaded)


def test_use_is_logged_once_and_detected_by_mmengine() -> None:
    code = """
import mmevm, mmcv.ops, mmcv._ext
from mmengine.utils.dl_utils.misc import mmcv_full_available
assert mmcv_full_available()
print(mmcv.ops.get_compiler_version(), '|', mmcv.ops.get_compiling_cuda_version())
"""
    output = run(code)
    assert output.count("using mmevm's fallback operators") == 1
    assert 'none (fallback operators of mmevm) | not available' in output


def test_mmcv_ops_imports_nothing_else_of_mmevm(tmp_path: Path) -> None:
    (tmp_path / 'mmevm').mkdir()
    (tmp_path / 'mmevm' / '__init__.py').touch()
    (tmp_path / 'mmevm' / 'mmcv_ops').symlink_to(Path(mmevm.mmcv_ops.__file__).parent)
    code = """
import pkgutil, sys
sys.path.remove('')  # the working directory, which may contain mmevm
import mmevm.mmcv_ops
mmevm.mmcv_ops.register()
import mmcv.ops
for module in pkgutil.iter_modules(mmevm.mmcv_ops.__path__, 'mmevm.mmcv_ops.'):
    if not module.name.endswith('__main__'):
        __import__(module.name)
print([name for name in sys.modules if name.startswith('mmevm.') and not name.startswith('mmevm.mmcv_ops')])
"""
    assert run(code, tmp_path).endswith('[]\n')


def test_mmcv_ops_needs_the_fallback() -> None:
    """The other tests assume that this mmcv has no compiled operators."""
    code = """
try:
    import mmcv.ops
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert 'mmcv._ext' in run(code)
