"""mmevm's classifiers in mmpretrain's hub: what is listed, what it builds, and that weights arrive whole."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import mmpretrain
import numpy as np
import pytest
import timm
import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.registry import DefaultScope
from mmpretrain.apis import ImageClassificationInferencer, ModelHub
from mmpretrain.datasets import ImageNet
from PIL import Image
from randomize import randomize
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

from mmevm import model_hub as model_index

ROOT = Path(__file__).parents[2]

# Top-1 accuracy, as the paper has it: Table 3 (300 and 450 epochs), Table 6 (distilled), Table 5 (fine-tuned).
PAPER = {
    'efficientvim-m1_300e_in1k': 72.9,
    'efficientvim-m2_300e_in1k': 75.4,
    'efficientvim-m3_300e_in1k': 77.6,
    'efficientvim-m4_300e_in1k': 79.4,
    'efficientvim-m1_450e_in1k': 73.5,
    'efficientvim-m2_450e_in1k': 75.8,
    'efficientvim-m3_450e_in1k': 77.9,
    'efficientvim-m4_450e_in1k': 79.6,
    'efficientvim-m1-distilled_300e_in1k': 74.6,
    'efficientvim-m2-distilled_300e_in1k': 76.7,
    'efficientvim-m3-distilled_300e_in1k': 79.1,
    'efficientvim-m4-distilled_300e_in1k': 80.7,
    'efficientvim-m4_ft30e_in1k-384px': 80.9,
    'efficientvim-m4_ft30e_in1k-512px': 81.9,
}
# Millions of multiply-adds, of the same tables.
PAPER_MFLOPS = {224: dict(m1=239, m2=355, m3=656), 256: dict(m4=1111), 384: dict(m4=2379), 512: dict(m4=4154)}
TRAINING = {'300e': ('e300', 300, False), '450e': ('e450', 450, False), 'distill': ('dist', 300, True)}


def parts(name: str) -> tuple[str, str]:
    """The architecture and the training that a name of the hub tells."""
    arch, training, dataset = name.removeprefix('efficientvim-').split('_')
    assert dataset == 'in1k'
    return arch, training.removeprefix('3rdparty-')


def timm_name(name: str) -> str | None:
    arch, training = parts(name)
    if training.startswith('ft'):
        return None
    return f'efficientvim_{arch}_dist.in1k' if training == 'distill' else f'efficientvim_{arch}.e{training[:-1]}_in1k'


def image_size(name: str) -> int:
    arch, training = parts(name)
    return int(training[2:]) if training.startswith('ft') else 256 if arch == 'm4' else 224


@functools.cache
def entry(name: str):
    """The hub's, which reads the config anew each time that it is asked."""
    return ModelHub.get(name)


def once(name: str) -> str:
    """The training of 300 epochs in place of that of 450: the same network."""
    return name.replace('450e', '300e')


# What is listed


def test_the_papers_classifiers_are_listed_and_no_others():
    assert mmpretrain.list_models('efficientvim*') == sorted(PAPER)
    assert ImageClassificationInferencer.list_models('efficientvim*') == sorted(PAPER)


@pytest.mark.parametrize('name', PAPER)
def test_accuracies_are_the_papers(name):
    (result,) = entry(name).results
    assert (result.task, result.dataset) == ('Image Classification', 'ImageNet-1k')
    assert result.metrics == {'Top 1 Accuracy': PAPER[name]}


def test_weights_are_all_that_timm_has_each_with_its_own_name():
    weights = {name: entry(name).weights for name in PAPER}
    assert weights == {name: timm_name(name) and f'timm://{timm_name(name)}' for name in PAPER}
    listed = [weight.removeprefix('timm://') for weight in weights.values() if weight]
    assert sorted(listed) == timm.list_models('efficientvim*', pretrained=True)


@pytest.mark.parametrize('name', [name for name in PAPER if timm_name(name)])
def test_the_origin_of_weights_is_where_timm_fetches_them(name):
    origin = entry(name).data['Converted From']
    assert origin['Weights'] == f'https://huggingface.co/{timm.get_pretrained_cfg(timm_name(name)).hf_hub_id}'
    assert origin['Code'] == 'https://github.com/mlvlab/EfficientViM'


@pytest.mark.parametrize('name', PAPER)
def test_a_name_tells_what_its_config_trains(name):
    cfg = entry(name).config
    arch, training = parts(name)
    _, epochs, distilled = TRAINING.get(training, (None, 30, False))
    assert cfg.model.backbone.arch == arch
    assert cfg.train_cfg.max_epochs == epochs
    assert cfg.model.head.get('distilled', False) == distilled
    assert ('mmevm.DistillationHook' in [hook.type for hook in cfg.custom_hooks]) == distilled
    resize, *crop = cfg.test_dataloader.dataset.pipeline[1:-1]
    assert (crop[0].crop_size if crop else resize.scale) == image_size(name)


@pytest.mark.parametrize('name', dict.fromkeys(map(once, PAPER)))
def test_parameters_are_those_of_timms(name):
    theirs = timm.create_model((timm_name(name) or 'efficientvim_m4').split('.')[0], pretrained=False)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == entry(name).metadata.data['Parameters']


@pytest.mark.parametrize('name', PAPER)
def test_flops_are_near_the_papers(name):
    # The authors' count leaves out their LayerNorms, and the paper's the second set of classifiers.
    paper = PAPER_MFLOPS[image_size(name)][parts(name)[0]]
    assert entry(name).metadata.data['FLOPs'] / 1e6 == pytest.approx(paper, rel=7e-3)


@pytest.mark.parametrize('name', [name for name in PAPER if name != once(name)])
def test_longer_training_costs_no_more_in_use(name):
    longer, shorter = entry(name), entry(once(name))
    assert longer.config.model == shorter.config.model
    assert longer.metadata.data == shorter.metadata.data


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('training', ['300e', 'distill'])
def test_parameters_and_flops_are_those_of_the_model(training):
    """Of every other config they are compared with mmevm's own count, in test_complexity.py."""
    name = f'efficientvim-m1_3rdparty-{training}_in1k'
    model = mmpretrain.get_model(name)
    listed = entry(name).metadata.data
    assert sum(parameter.numel() for parameter in model.parameters()) == listed['Parameters']
    counted = get_model_complexity_info(model, (3, 224, 224), show_table=False, show_arch=False)
    assert counted['flops'] == listed['FLOPs']


# Weights and inference


@pytest.fixture
def image(tmp_path):
    """A picture in a format that every decoder reads alike."""
    path = tmp_path / 'picture.png'
    with Image.open(ROOT / 'docs/pictures/demo.jpg') as picture:
        picture.convert('RGB').crop((0, 0, 500, 330)).save(path)
    with DefaultScope.overwrite_default_scope('mmpretrain'):  # whatever scope an earlier test has left
        yield path


def fill_hub_cache(hub: Path, name: str) -> torch.nn.Module:
    """Lay random weights where those of timm's would be, and give the timm model that has them."""
    model = randomize(timm.create_model(name.split('.')[0], pretrained=False)).eval()
    for key, tensor in model.state_dict().items():
        if key.endswith('num_batches_tracked'):
            tensor.fill_(len(key))
        elif key.startswith('heads'):
            tensor.mul_(10)  # fresh ones answer nearly the same to every picture
    commit = 'a' * 40
    repo = hub / f'models--timm--{name}'
    (repo / 'refs').mkdir(parents=True)
    (repo / 'refs' / 'main').write_text(commit)
    (repo / 'snapshots' / commit).mkdir(parents=True)
    save_file(model.state_dict(), repo / 'snapshots' / commit / 'model.safetensors')
    return model


@pytest.mark.parametrize('training', ['m1_3rdparty-450e', 'm2_3rdparty-distill', 'm4_3rdparty-300e'])
def test_every_pretrained_tensor_arrives_and_an_image_is_classified_as_by_timm(training, image, tmp_path, monkeypatch):
    name = f'efficientvim-{training}_in1k'
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    theirs = fill_hub_cache(tmp_path / 'hub', timm_name(name))

    inferencer = ImageClassificationInferencer(name, pretrained=True, device='cpu')

    ours = inferencer.model.state_dict()
    expected = {
        f'{"backbone" if key.startswith(("patch_embed.", "stages.")) else "head"}.{key}': tensor
        for key, tensor in theirs.state_dict().items()
    }
    assert set(ours) == set(expected)
    assert [key for key, tensor in expected.items() if not ours[key].flatten().equal(tensor.flatten())] == []

    (result,) = inferencer(str(image))
    transform = create_transform(
        **resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(timm_name(name)).to_dict())
    )
    with torch.no_grad(), Image.open(image) as picture:
        logits = theirs(transform(picture)[None])[0]
    assert logits.std() > 0.1  # else every picture would do
    assert result['pred_label'] == logits.argmax()
    log_scores = np.log(result['pred_scores'])
    np.testing.assert_allclose(log_scores, logits.log_softmax(0).numpy(), rtol=0, atol=1e-3 * logits.std().item())


def test_random_weights_classify_too(image):
    (result,) = ImageClassificationInferencer('efficientvim-m1_300e_in1k', pretrained=False)(str(image))
    assert result['pred_scores'].shape == (1000,)
    assert result['pred_scores'].sum() == pytest.approx(1, abs=1e-5)
    assert result['pred_class'] == ImageNet.METAINFO['classes'][result['pred_label']]


# Imports, each in a process of its own


def run(code: str, *paths: Path) -> str:
    """Run Python where the first of the paths is the working directory, which Python's path begins with."""
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(map(str, paths)), 'OMP_NUM_THREADS': '1'}
    command = [sys.executable, '-c', code]
    result = subprocess.run(command, env=environment, cwd=paths[0], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_importing_mmevm_imports_neither_mmpretrain_nor_anything_heavy():
    loaded = run('import sys, mmevm; print(*sys.modules)', ROOT).split()
    assert 'mmevm.model_hub' in loaded
    assert not {'mmpretrain', 'mmengine', 'mmcv', 'modelindex', 'torch', 'yaml'} & set(loaded)


@pytest.mark.slow
@pytest.mark.parametrize('imports', ['import mmevm, mmpretrain', 'import mmpretrain, mmevm'])
def test_either_may_be_imported_first(imports):
    code = f"""
{imports}
assert len(mmpretrain.list_models('efficientvim*')) == {len(PAPER)}
print(type(mmpretrain.get_model('efficientvim-m1_300e_in1k').backbone))
"""
    assert 'mmevm.models.efficientvim.EfficientViM' in run(code, ROOT)


HUB = """
calls = []

class ModelHub:
    @classmethod
    def register_model_index(cls, path, config_prefix=None):
        assert path.is_file() and (config_prefix / 'configs/classification').is_dir()
        calls.append(path)
"""


@pytest.fixture
def other_mmpretrain(tmp_path):
    """A package of that name, which takes no time to import."""
    apis = tmp_path / 'mmpretrain' / 'apis'
    apis.mkdir(parents=True)
    (apis.parent / '__init__.py').touch()
    (apis / '__init__.py').touch()
    (apis / 'model.py').write_text(HUB)
    return tmp_path


def test_models_are_registered_once_whatever_is_imported_or_reloaded(other_mmpretrain):
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
    run(code, other_mmpretrain, ROOT)


def test_the_hub_is_loaded_as_it_would_be_without_mmevm(other_mmpretrain):
    code = """
import inspect
{}
from mmpretrain.apis import model
print(type(model.__loader__), type(model.__spec__.loader), model.__spec__.origin, inspect.getsource(model))
"""
    with_mmevm, without = (run(code.format(line), other_mmpretrain, ROOT) for line in ('import mmevm', ''))
    assert with_mmevm == without


def test_source_of_the_hub_can_be_had_before_it_is_loaded(other_mmpretrain):
    code = """
import importlib.util, mmevm
print(importlib.util.find_spec('mmpretrain.apis.model').loader.get_source('mmpretrain.apis.model'))
"""
    assert 'register_model_index' in run(code, other_mmpretrain, ROOT)


def test_what_fails_in_the_hub_is_seen_as_it_is(other_mmpretrain):
    (other_mmpretrain / 'mmpretrain/apis/model.py').write_text('raise ImportError("no modelindex here")')
    code = """
import mmevm
try:
    import mmpretrain.apis.model
except ImportError as error:
    print(error)
"""
    assert run(code, other_mmpretrain, ROOT).strip() == 'no modelindex here'


def test_without_mmpretrain_there_is_no_more_than_pythons_own_error(other_mmpretrain):
    (other_mmpretrain / 'mmpretrain/apis/model.py').unlink()
    code = """
import mmevm
try:
    import mmpretrain.apis.model
except ModuleNotFoundError as error:
    print(error)
"""
    assert run(code, other_mmpretrain, ROOT).strip() == "No module named 'mmpretrain.apis.model'"


def test_a_package_without_its_index_warns_and_goes_on(other_mmpretrain):
    shutil.copytree(ROOT / 'mmevm', other_mmpretrain / 'mmevm', ignore=shutil.ignore_patterns('__pycache__'))
    printed = run('import mmevm, mmpretrain.apis.model as m; assert not m.calls', other_mmpretrain)
    assert f'{other_mmpretrain / "model-index.yml"} is missing' in printed
    assert 'install mmevm again' in printed


def test_a_name_that_is_taken_keeps_nothing_from_loading(other_mmpretrain):
    hub = other_mmpretrain / 'mmpretrain/apis/model.py'
    hub.write_text(
        """
class ModelHub:
    @classmethod
    def register_model_index(cls, path, config_prefix):
        raise ValueError('The model name efficientvim-m1 is conflict')
"""
    )
    printed = run('import mmevm, mmpretrain.apis.model; print("loaded")', other_mmpretrain, ROOT)
    assert "mmpretrain does not list all of mmevm's classifiers: The model name efficientvim-m1" in printed
    assert 'loaded' in printed


# Installed, not editable


def files(folder: Path) -> set[Path]:
    """What git would track of a folder."""
    return {path.relative_to(folder) for suffix in ('py', 'yml', 'md') for path in folder.rglob(f'*.{suffix}')}


@pytest.mark.slow
def test_an_installed_package_brings_its_configs(tmp_path):
    source, site = tmp_path / 'source', tmp_path / 'site'
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns('.*', '__pycache__', 'work_dirs', 'build', '*.egg-info')
    )
    pip = [sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-build-isolation', '--target', site, source]
    result = subprocess.run(pip, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    shutil.rmtree(source)

    code = """
import mmevm, mmpretrain
from mmpretrain.apis import ModelHub
for name in mmpretrain.list_models('efficientvim*'):
    print('listed', name, ModelHub.get(name).config.filename)
print(type(mmpretrain.get_model('efficientvim-m1_300e_in1k')))
"""
    printed = run(code, site)
    listed = [line.split()[1:] for line in printed.splitlines() if line.startswith('listed')]
    assert [name for name, _ in listed] == sorted(PAPER)
    mim = site / 'mmevm' / '.mim'
    assert all(Path(config).is_relative_to(mim / 'configs' / 'classification') for _, config in listed)
    for folder in ('configs', 'tools'):
        assert files(mim / folder) == files(ROOT / folder)


def test_the_index_of_this_repository_is_the_one_in_use():
    assert model_index.find_index() == ROOT / 'model-index.yml'
