"""Listed models against the paper and timm, and inference with timm's weights."""

import functools
import re
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import mmpretrain
import numpy as np
import pytest
import timm
import torch
from command_line import ROOT
from mmengine.analysis import get_model_complexity_info
from mmengine.registry import DefaultScope
from mmpretrain.apis import ImageClassificationInferencer, ModelHub
from mmpretrain.datasets import ImageNet
from PIL import Image
from randomize import randomize
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config

# Top-1 accuracy from Table 3 (300 and 450 epochs), Table 6 (distilled) and Table 5 (fine-tuned).
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
# Millions of multiply-adds, from the same tables.
PAPER_MFLOPS = {224: dict(m1=239, m2=355, m3=656), 256: dict(m4=1111), 384: dict(m4=2379), 512: dict(m4=4154)}


class Parts(NamedTuple):
    """What the name of a model says."""

    arch: str
    distilled: bool
    epochs: int
    image_size: int


def parts(name: str) -> Parts:
    arch, schedule, dataset = name.removeprefix('efficientvim-').split('_')
    arch, _, variant = arch.partition('-')
    default = 256 if arch == 'm4' else 224
    size = int(dataset.partition('-')[2].removesuffix('px') or default)
    return Parts(arch, variant == 'distilled', int(re.sub(r'\D', '', schedule)), size)


def timm_name(name: str) -> str | None:
    arch, distilled, epochs, _ = parts(name)
    if 'ft' in name:
        return None
    return f'efficientvim_{arch}_dist.in1k' if distilled else f'efficientvim_{arch}.e{epochs}_in1k'


@functools.cache
def entry(name: str):
    """Cache what the hub reads from the config at each call."""
    return ModelHub.get(name)


def with_300_epochs(name: str) -> str:
    """Return the model of the same architecture that was trained for 300 epochs."""
    return name.replace('450e', '300e')


def test_listed_models():
    assert mmpretrain.list_models('efficientvim*') == sorted(PAPER)
    assert ImageClassificationInferencer.list_models('efficientvim*') == sorted(PAPER)


@pytest.mark.parametrize('name', PAPER)
def test_accuracies_equal_the_paper(name):
    (result,) = entry(name).results
    assert (result.task, result.dataset) == ('Image Classification', 'ImageNet-1k')
    assert result.metrics == {'Top 1 Accuracy': PAPER[name]}


def test_weights_are_all_of_timm():
    weights = {name: entry(name).weights for name in PAPER}
    assert weights == {name: timm_name(name) and f'timm://{timm_name(name)}' for name in PAPER}
    listed = [weight.removeprefix('timm://') for weight in weights.values() if weight]
    assert sorted(listed) == timm.list_models('efficientvim*', pretrained=True)


@pytest.mark.parametrize('name', [name for name in PAPER if timm_name(name)])
def test_origin_of_weights(name):
    origin = entry(name).data['Converted From']
    assert origin['Weights'] == f'https://huggingface.co/{timm.get_pretrained_cfg(timm_name(name)).hf_hub_id}'
    assert origin['Code'] == 'https://github.com/mlvlab/EfficientViM'


@pytest.mark.parametrize('name', PAPER)
def test_config_of_a_name(name):
    cfg = entry(name).config
    arch, distilled, epochs, image_size = parts(name)
    assert Path(cfg.filename).stem == name
    assert cfg.model.backbone.arch == arch
    assert cfg.train_cfg.max_epochs == epochs
    assert cfg.model.head.get('distilled', False) == distilled
    assert ('mmevm.DistillationHook' in [hook.type for hook in cfg.custom_hooks]) == distilled
    resize, *crop = cfg.test_dataloader.dataset.pipeline[1:-1]
    assert (crop[0].crop_size if crop else resize.scale) == image_size


@pytest.mark.parametrize('name', dict.fromkeys(map(with_300_epochs, PAPER)))
def test_parameters_equal_timm(name):
    theirs = timm.create_model((timm_name(name) or 'efficientvim_m4').split('.')[0], pretrained=False)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == entry(name).metadata.data['Parameters']


@pytest.mark.parametrize('name', PAPER)
def test_flops_are_near_the_paper(name):
    # The authors do not count their LayerNorms, and the paper does not count the second set of classifiers.
    paper = PAPER_MFLOPS[parts(name).image_size][parts(name).arch]
    assert entry(name).metadata.data['FLOPs'] / 1e6 == pytest.approx(paper, rel=7e-3)


@pytest.mark.parametrize('name', [name for name in PAPER if name != with_300_epochs(name)])
def test_same_model_for_450_epochs(name):
    longer, shorter = entry(name), entry(with_300_epochs(name))
    assert longer.config.model == shorter.config.model
    assert longer.metadata.data == shorter.metadata.data


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ['efficientvim-m1_300e_in1k', 'efficientvim-m1-distilled_300e_in1k'])
def test_parameters_and_flops_equal_the_model(name):
    """The other models are compared in test_complexity.py."""
    model = mmpretrain.get_model(name)
    listed = entry(name).metadata.data
    assert sum(parameter.numel() for parameter in model.parameters()) == listed['Parameters']
    counted = get_model_complexity_info(model, (3, 224, 224), show_table=False, show_arch=False)
    assert counted['flops'] == listed['FLOPs']


@pytest.fixture
def image(tmp_path):
    """A lossless image, which all decoders read alike."""
    path = tmp_path / 'picture.png'
    with Image.open(ROOT / 'docs/pictures/photos.jpg') as picture:
        picture.convert('RGB').crop((0, 0, 500, 330)).save(path)
    with DefaultScope.overwrite_default_scope('mmpretrain'):  # earlier tests change it
        yield path


def fill_hub_cache(hub: Path, name: str) -> torch.nn.Module:
    """Put random weights into the cache of the Hugging Face hub, and return the timm model with these weights."""
    model = randomize(timm.create_model(name.split('.')[0], pretrained=False)).eval()
    for key, tensor in model.state_dict().items():
        if key.endswith('num_batches_tracked'):
            tensor.fill_(len(key))
        elif key.startswith('heads'):
            tensor.mul_(10)  # otherwise all images get nearly the same logits
    commit = 'a' * 40
    repo = hub / f'models--timm--{name}'
    (repo / 'refs').mkdir(parents=True)
    (repo / 'refs' / 'main').write_text(commit)
    (repo / 'snapshots' / commit).mkdir(parents=True)
    save_file(model.state_dict(), repo / 'snapshots' / commit / 'model.safetensors')
    return model


@pytest.mark.parametrize(
    'name', ['efficientvim-m1_450e_in1k', 'efficientvim-m2-distilled_300e_in1k', 'efficientvim-m4_300e_in1k']
)
def test_pretrained_model_classifies_like_timm(name, image, tmp_path, monkeypatch):
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
    assert logits.std() > 0.1  # otherwise any image would do
    assert result['pred_label'] == logits.argmax()
    log_scores = np.log(result['pred_scores'])
    np.testing.assert_allclose(log_scores, logits.log_softmax(0).numpy(), rtol=0, atol=1e-3 * logits.std().item())


def test_inference_with_random_weights(image):
    (result,) = ImageClassificationInferencer('efficientvim-m1_300e_in1k', pretrained=False)(str(image))
    assert result['pred_scores'].shape == (1000,)
    assert result['pred_scores'].sum() == pytest.approx(1, abs=1e-5)
    assert result['pred_class'] == ImageNet.METAINFO['classes'][result['pred_label']]
