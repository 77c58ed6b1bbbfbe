"""Imports follow the layout of the package: no cycles, and each package imports only packages below it."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from command_line import ROOT

import mmevm

# From bottom to top. A module may import those of its own level and of the levels before it.
LEVELS = [
    {'mmevm.errors', 'mmevm.version', 'mmevm.compat', 'mmevm.distributions', 'mmevm.registry', 'mmevm.mmcv_ops'},
    {'mmevm.tensors', 'mmevm.tables', 'mmevm.env', 'mmevm.import_hooks', 'mmevm.download'},
    {'mmevm.config_path', 'mmevm.checkpoint_schemes', 'mmevm.model_hub'},
    {'mmevm.models'},
    {'mmevm.checkpoints'},
    {'mmevm.engine'},
    {'mmevm.checks'},
    {'mmevm.cli', 'mmevm.deployment'},
    {'mmevm.analysis', 'mmevm.inference'},
    {'mmevm.__main__'},
]
# What mmevm.models may import besides the standard library.
MODELS = {'torch', 'mmengine', 'mmcv', 'timm'}
OPTIONAL = {'mmevm.models.upsample_fpn': {'mmdet'}, 'mmevm.models.classifier': {'mmpretrain'}}
PUBLIC = [
    ('EfficientViM', 'mmevm.models.efficientvim'),
    ('UpsampleFPN', 'mmevm.models.upsample_fpn'),
    ('HSMSSD', 'mmevm.models.mixers'),
    ('FusionClsHead', 'mmevm.models.classifier'),
    ('DistillationClassifier', 'mmevm.models.classifier'),
    ('deploy', 'mmevm.deployment.deploy'),
    ('convert_checkpoint', 'mmevm.checkpoints.convert'),
]


def find_modules():
    """Return the file of each module of mmevm."""
    modules = {}
    for path in sorted((ROOT / 'mmevm').rglob('*.py')):
        parts = path.relative_to(ROOT).with_suffix('').parts
        modules['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return modules


def is_type_checking(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == 'TYPE_CHECKING'


def iter_imports(node, package):
    """Yield (module, name) for each import at any depth, except those for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name, None) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = package.rsplit('.', child.level - 1)[0] if child.level else ''
            module = '.'.join(filter(None, [base, child.module]))
            yield from ((module, alias.name) for alias in child.names)
        elif is_type_checking(child):
            for statement in child.orelse:
                yield from iter_imports(statement, package)
        else:
            yield from iter_imports(child, package)


MODULES = find_modules()


def imports_of(module):
    """Return the modules of mmevm and the other top-level packages that a module imports."""
    path = MODULES[module]
    package = module if path.name == '__init__.py' else module.rpartition('.')[0]
    internal, external = set(), set()
    for target, name in iter_imports(ast.parse(path.read_text(encoding='utf-8')), package):
        if target.partition('.')[0] == 'mmevm':
            submodule = f'{target}.{name}'
            internal.add(submodule if submodule in MODULES else target)
        else:
            external.add(target.partition('.')[0])
    return internal - {module}, external


GRAPH = {module: imports_of(module)[0] for module in MODULES}


def level_of(module):
    levels = [i for i, names in enumerate(LEVELS) if '.'.join(module.split('.')[:2]) in names]
    assert levels, f'{module} has no level: add it to LEVELS.'
    return levels[0]


def test_imports_are_found():
    assert 'mmevm.models.layers' in GRAPH['mmevm.models.mixers']
    assert 'mmevm.deployment.post_processing' in GRAPH['mmevm.deployment.model_part']  # within a function
    assert 'torch' in imports_of('mmevm.models.layers')[1]


def test_imports_have_no_cycle():
    tuple(TopologicalSorter(GRAPH).static_order())  # raises CycleError


@pytest.mark.parametrize('module', [module for module in MODULES if module != 'mmevm'])
def test_module_imports_only_levels_below(module):
    above = {target for target in GRAPH[module] - {'mmevm'} if level_of(target) > level_of(module)}
    assert not above


def test_mmcv_ops_imports_nothing_else_of_mmevm():
    for module in MODULES:
        if module.startswith('mmevm.mmcv_ops'):
            assert all(target.startswith('mmevm.mmcv_ops') for target in GRAPH[module]), module


def test_checkpoints_and_models_are_independent():
    """Only registry, errors, compat and download are common to them."""
    common = {'mmevm.registry', 'mmevm.errors', 'mmevm.compat', 'mmevm.download'}
    for module, targets in GRAPH.items():
        for package in ('mmevm.models', 'mmevm.checkpoints'):
            if module.startswith(package):
                assert all(target.startswith(package) or target in common for target in targets), module


def test_models_import_few_packages():
    for module in MODULES:
        if module.startswith('mmevm.models'):
            external = imports_of(module)[1] - set(sys.stdlib_module_names)
            assert external <= MODELS | OPTIONAL.get(module, set()), module


def run(code):
    """Run code in a new Python process and return what it prints."""
    return subprocess.run(
        [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=300
    ).stdout.splitlines()[-1]


LOADED = 'import sys; print([m for m in {} if m in sys.modules])'


def test_backbone_loads_neither_detection_nor_checkpoints():
    """mmcv.cnn imports mmengine.runner, and timm imports huggingface_hub."""
    names = ['mmdet', 'mmpretrain', 'mmevm.checkpoints', 'mmevm.engine', 'mmcv.ops']
    assert run(f"import mmevm; mmevm.EfficientViM('m1'); {LOADED.format(names)}") == '[]'
    build = "from mmengine.registry import MODELS; MODELS.build(dict(type='mmevm.EfficientViM', arch='m1'))"
    assert run(f'{build}; {LOADED.format(names)}') == '[]'


def test_import_mmevm_is_light():
    names = ['torch', 'mmengine', 'mmcv', 'mmdet', 'mmpretrain', 'timm', 'numpy', 'mmevm.models']
    assert run(f'import mmevm; {LOADED.format(names)}') == '[]'


def test_tools_load_timm_and_detection_only_if_needed():
    """They take seconds."""
    names = ['timm', 'torchvision', 'mmdet', 'mmpretrain']
    assert run(f'import mmevm.cli, mmevm.engine; {LOADED.format(names)}') == '[]'


@pytest.mark.parametrize(('name', 'module'), PUBLIC)
def test_public_names(name, module):
    assert getattr(mmevm, name).__module__ == module
    assert name in dir(mmevm)
    assert name in mmevm.__all__


def test_public_names_are_complete():
    assert set(mmevm.__all__) == {'__version__', *(name for name, _ in PUBLIC)}
    with pytest.raises(AttributeError, match="module 'mmevm' has no attribute 'EfficientVim'"):
        mmevm.EfficientVim  # noqa: B018


def test_deploy_is_the_function_after_its_package_is_imported():
    code = 'import mmevm.deployment.export, mmevm.deployment.deploy; from mmevm import deploy; print(deploy.__module__)'
    assert run(code) == 'mmevm.deployment.deploy'
