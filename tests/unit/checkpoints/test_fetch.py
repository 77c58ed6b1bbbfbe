"""Fetch checkpoints from URLs, file backends and the Hugging Face Hub."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from checkpoint_formats import assert_same, authors_file, timm_state
from mmengine.fileio import LocalBackend, register_backend
from mmengine.runner.checkpoint import CheckpointLoader
from safetensors.torch import save_file

from mmevm.checkpoints import (
    CheckpointError,
    convert_checkpoint,
    fetch_checkpoint,
    load_pretrained,
)
from mmevm.models import EfficientViM

ROOT = Path(__file__).parents[3]


def test_load_from_url(server, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    authors_file(server.folder / 'm1.pth')
    expected = timm_state('efficientvim_m1', 1)
    backbone = EfficientViM('m1', init_cfg=dict(type='Pretrained', checkpoint=f'{server.url}/m1.pth'))
    backbone.init_weights()
    assert_same(backbone.state_dict(), {k: expected[k] for k in backbone.state_dict()})
    load_pretrained(backbone, f'{server.url}/m1.pth')  # from the cache
    assert server.requests == ['/m1.pth']
    with pytest.raises(CheckpointError, match=r'm2\.pth: download failed'):
        load_pretrained(backbone, f'{server.url}/m2.pth')


def test_unreachable_url_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with socket.socket() as silent:
        silent.bind(('127.0.0.1', 0))
        url = f'https://127.0.0.1:{silent.getsockname()[1]}/m1.pth'
        with pytest.raises(CheckpointError, match=f'{url}: download failed'):
            load_pretrained(EfficientViM('m1'), url)


def test_urls_with_the_same_file_name_are_cached_separately(server, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    for seed, folder in [(1, 'e300'), (2, 'e450')]:
        (server.folder / folder).mkdir()
        save_file(timm_state('efficientvim_m1', seed), server.folder / folder / 'model.safetensors')
    for seed, folder in [(1, 'e300'), (2, 'e450'), (1, 'e300')]:
        backbone = EfficientViM('m1')
        load_pretrained(backbone, f'{server.url}/{folder}/model.safetensors')
        expected = timm_state('efficientvim_m1', seed)
        assert_same(backbone.state_dict(), {k: expected[k] for k in backbone.state_dict()})
    assert len(server.requests) == 2


class Shelf(LocalBackend):
    """A custom file backend, which removes its local copy after the file was read."""

    @contextlib.contextmanager
    def get_local_path(self, uri):
        path = Path(uri.removeprefix('shelf://'))
        copy = path.with_suffix('.copy')
        shutil.copy(path, copy)
        yield copy
        copy.unlink()


register_backend('shelf', Shelf, force=True, prefixes='shelf')


def test_fetch_from_a_file_backend_of_mmengine(tmp_path):
    expected = timm_state('efficientvim_m1')
    torch.save(expected, tmp_path / 'x.pth')
    assert_same(fetch_checkpoint(f'shelf://{tmp_path}/x.pth'), expected)
    assert os.listdir(tmp_path) == ['x.pth']
    (tmp_path / 'y.pth').write_text('a page')
    for uri, problem in [
        (f'shelf://{tmp_path}/y.pth', ': .*y.copy is text'),
        (
            f'shelf://{tmp_path}/z.pth',
            r': download by the file backend .* failed \(FileNotFoundError\)\.',
        ),
        (f'drawer://{tmp_path}/x.pth', ': download by the file backend of mmengine failed'),
    ]:
        with pytest.raises(CheckpointError, match=f'^{uri}{problem}'):
            fetch_checkpoint(uri)


def test_fetch_to_a_device(server, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    path = server.folder / 'x.pth'
    torch.save({'w': torch.ones(2)}, path)
    for name in (f'{server.url}/x.pth', f'shelf://{path}', str(path)):
        assert fetch_checkpoint(name)['w'].device.type == 'cpu'
        assert fetch_checkpoint(name, 'meta')['w'].device.type == 'meta'
    (name,) = os.listdir(tmp_path / 'torch' / 'hub' / 'checkpoints')
    assert re.fullmatch(r'[0-9a-f]{12}-x\.pth', name)


DISTRIBUTED = """
import sys
import torch.distributed
from mmevm.models import EfficientViM

torch.distributed.init_process_group('gloo')
backbone = EfficientViM('m1', init_cfg=dict(type='Pretrained', checkpoint=sys.argv[1]))
try:
    backbone.init_weights()
    print('sum:', sum(t.double().sum().item() for t in backbone.state_dict().values()))
except RuntimeError as error:
    print('refused:', error)
"""


@pytest.mark.slow
@pytest.mark.parametrize('exists', [True, False])
def test_one_process_per_node_downloads(server, tmp_path, exists):
    if exists:
        authors_file(server.folder / 'm1.pth')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    environment = dict(
        MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE='2', TORCH_HOME=str(tmp_path / 'torch')
    )
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', DISTRIBUTED, f'{server.url}/m1.pth'],
            env={
                **os.environ,
                'PYTHONPATH': str(ROOT),
                'OMP_NUM_THREADS': '1',
                **environment,
                'RANK': r,
                'LOCAL_RANK': r,
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for r in '01'
    ]
    results = [process.communicate(timeout=300)[0].splitlines()[-1] for process in processes]
    expected = timm_state('efficientvim_m1', 1)
    total = sum(t.double().sum().item() for k, t in expected.items() if k.startswith(('patch', 'stages')))
    for result in results:
        if exists:
            assert float(result.removeprefix('sum:')) == pytest.approx(total)
        else:
            assert 'refused:' in result
            assert 'download failed' in result
    assert server.requests == ['/m1.pth'] * (1 if exists else 2)


NAME = 'efficientvim_m1.e450_in1k'


def fill_hub_cache(hub: Path, repository: str = f'timm/{NAME}', seed: int = 0, revision: str = 'main') -> None:
    """Write a cache of the Hugging Face Hub: a reference from a branch to a commit, and the files of the commit."""
    commit = f'{seed:040}'
    repo = hub / f'models--{repository.replace("/", "--")}'
    (repo / 'refs').mkdir(parents=True, exist_ok=True)
    (repo / 'refs' / revision).write_text(commit)
    (repo / 'snapshots' / commit).mkdir(parents=True)
    save_file(timm_state('efficientvim_m1', seed), repo / 'snapshots' / commit / 'model.safetensors')


def test_timm_scheme_reads_the_hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    fill_hub_cache(tmp_path)
    expected = timm_state('efficientvim_m1')
    backbone = EfficientViM('m1', init_cfg=dict(type='Pretrained', checkpoint=f'timm://{NAME}'))
    seed = torch.random.get_rng_state()
    backbone.init_weights()
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert_same(backbone.state_dict(), {k: expected[k] for k in backbone.state_dict()})

    loaded = CheckpointLoader.load_checkpoint(f'timm://{NAME}', 'cpu')
    assert set(loaded['meta'].items()) == set(convert_checkpoint(expected)[0]['meta'].items())
    assert_same(loaded['state_dict'], convert_checkpoint(expected)[0]['state_dict'])


@pytest.mark.parametrize(
    ('name', 'seed'),
    [
        ('efficientvim_m1', 1),  # timm's default tag, e300_in1k
        ('efficientvim_m1.e300_in1k', 1),
        ('efficientvim_m1.e450_in1k', 2),
        ('hf-hub:timm/efficientvim_m1.e450_in1k', 2),
        ('hf_hub:me/private', 3),
        ('hf-hub:me/private@main', 3),
        ('hf-hub:me/private@v2', 4),
    ],
)
def test_timm_scheme_accepts_the_names_of_timm(tmp_path, monkeypatch, name, seed):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    fill_hub_cache(tmp_path, 'timm/efficientvim_m1.e300_in1k', 1)
    fill_hub_cache(tmp_path, 'timm/efficientvim_m1.e450_in1k', 2)
    fill_hub_cache(tmp_path, 'me/private', 3)
    fill_hub_cache(tmp_path, 'me/private', 4, 'v2')
    state = fetch_checkpoint(f'timm://{name}')['state_dict']
    assert_same(state, convert_checkpoint(timm_state('efficientvim_m1', seed))[0]['state_dict'])
    if not name.startswith('hf'):
        assert torch.equal(timm.create_model(name, pretrained=True).weights, state['head.weights'])


def test_timm_scheme_names_the_repository_of_another_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    fill_hub_cache(tmp_path, 'me/other')
    (path,) = tmp_path.rglob('model.safetensors')
    save_file({'w': torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r'^timm://hf-hub:me/other: The tensors are named w, but an EfficientViM'):
        fetch_checkpoint('timm://hf-hub:me/other')


def test_timm_scheme_offline_error_suggests_two_solutions(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(CheckpointError, match=r'model\.safetensors.*backbone\.init_cfg=None') as error:
        load_pretrained(EfficientViM('m1'), f'timm://{NAME}')
    assert f'timm/{NAME}' in str(error.value)
    assert error.value.__cause__ is not None
    with pytest.raises(CheckpointError, match=r'^timm://hf-hub:a/b/c: download failed \(HFValidationError\)'):
        fetch_checkpoint('timm://hf-hub:a/b/c')


def test_timm_scheme_error_lists_the_available_names():
    for name in ('efficientvim_m5.e450_in1k', 'resnet50.a1_in1k', 'efficientvim_m1.e1_in1k'):
        with pytest.raises(CheckpointError, match=f'{name}.*efficientvim_m4.e450_in1k'):
            load_pretrained(EfficientViM('m1'), f'timm://{name}')


HUB = """
import sys
from mmevm.checkpoints import fetch_checkpoint
for name in sys.argv[1:]:
    try:
        print(name, fetch_checkpoint(f'timm://{name}')['state_dict']['head.weights'].sum().item())
    except RuntimeError as error:
        print(name, error)
"""


def test_timm_scheme_downloads_from_the_hub(server, tmp_path):
    names = ['efficientvim_m1', 'hf-hub:me/both', 'hf-hub:me/bin', 'hf-hub:me/none']
    for seed, (repository, filename) in enumerate(
        [
            ('timm/efficientvim_m1.e300_in1k', 'model.safetensors'),
            ('me/both', 'model.safetensors'),
            ('me/both', 'pytorch_model.bin'),
            ('me/bin', 'pytorch_model.bin'),
        ]
    ):
        path = server.folder / repository / 'resolve' / 'main' / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        save = save_file if filename.endswith('safetensors') else torch.save
        save(timm_state('efficientvim_m1', seed), path)
    environment = dict(HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / 'hf'), HF_HUB_OFFLINE='0', PYTHONPATH=str(ROOT))
    command = [sys.executable, '-c', HUB, *names]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    printed = dict(line.split(' ', 1) for line in done.stdout.splitlines() if line.startswith(tuple(names)))
    for name, seed in zip(names, [0, 1, 3], strict=False):
        assert float(printed[name]) == pytest.approx(timm_state('efficientvim_m1', seed)['weights'].sum().item())
    assert re.match(r'timm://hf-hub:me/none: download failed \(\w+Error\)', printed[names[-1]])
