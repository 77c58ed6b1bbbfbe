"""Checkpoints in the layouts of others, made here from timm's and mmdet's models, must arrive whole or be refused."""

import argparse
import builtins
import contextlib
import dataclasses
import functools
import http.server
import importlib.util
import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import types
import zipfile
from collections import OrderedDict
from pathlib import Path

import huggingface_hub
import mmdet
import pytest
import timm
import torch
import torch.nn.functional as F
from malicious import Call
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.config import Config
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.model import PretrainedInit
from mmengine.runner import Runner, runner
from mmengine.runner.checkpoint import CheckpointLoader, _load_checkpoint_with_prefix
from safetensors.torch import save_file
from torch import nn

from mmevm.checkpoints import (
    CheckpointError,
    ConversionReport,
    check_partial,
    convert_checkpoint,
    fetch_checkpoint,
    load_pretrained,
    load_strict,
    load_trained_weights,
    read_checkpoint,
    unwrap_model,
)
from mmevm.models import EfficientViM, FusionClsHead, UpsampleFPN
from mmevm.models.weight_init import pretrained_cfgs
from mmevm.registry import MODELS

ROOT = Path(__file__).parents[3]


# The layouts of others


def randomize(state: dict[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor random, so that each one left behind shows in the features."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, tensor in state.items():
        if name.endswith('num_batches_tracked'):
            result[name] = torch.randint(1, 1000, (), generator=generator)
        elif name.endswith('running_var'):
            result[name] = torch.rand(tensor.shape, generator=generator) + 0.5
        else:
            fan = tensor[0].numel() if tensor.dim() > 1 else 4
            result[name] = torch.randn(tensor.shape, generator=generator) * fan**-0.5
            result[name] += name.endswith('norm.weight')
    return result


@functools.lru_cache
def timm_state(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    return randomize(timm.create_model(name, pretrained=False).state_dict(), seed)


def timm_features(name: str, state: dict[str, torch.Tensor], images: torch.Tensor) -> list[torch.Tensor]:
    model = timm.create_model(name, pretrained=False).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return model.forward_intermediates(images, intermediates_only=True)


def authors_layout(state: dict[str, torch.Tensor]) -> OrderedDict[str, torch.Tensor]:
    """Their LayerNorms are (1, C, 1), the one of the last map and those of the neck (1, C, 1, 1)."""
    result = OrderedDict()
    for name, tensor in state.items():
        parts = name.removeprefix('backbone.').split('.')
        if parts[0] == 'norm' or (parts[0] == 'stages' and parts[2] == 'blocks' and parts[4] == 'norm'):
            tensor = tensor.reshape((1, -1, 1, 1) if parts[:2] == ['norm', '3'] else (1, -1, 1))
        result[name] = tensor
    return result


def authors_file(path: Path, name: str = 'efficientvim_m1', prefix: str = '', **save) -> Path:
    """EMA weights of seed 1, plain ones of seed 0, and objects of classes that nobody else can import."""
    module = types.ModuleType('gone')
    node = type('CfgNode', (dict,), {'__module__': 'gone'})
    module.CfgNode = node
    config = node(MODEL=node(TYPE='efficientvim'), AMP=True)
    config.frozen = True
    states = [authors_layout(timm_state(name, seed)) for seed in (0, 1)]
    plain, ema = (OrderedDict((prefix + key, tensor) for key, tensor in state.items()) for state in states)
    sys.modules['gone'] = module
    try:
        torch.save(
            {
                'model': plain,
                'model_ema': ema,
                'optimizer': {'state': {0: {'exp_avg': torch.ones(2)}}, 'param_groups': [{'lr': 1e-3}]},
                'epoch': 449,
                'config': config,
                'args': argparse.Namespace(batch_size=2048, node=node()),
            },
            path,
            **save,
        )
    finally:
        del sys.modules['gone']
    return path


@functools.lru_cache
def detector_state(kind: str, num_classes: int) -> dict[str, torch.Tensor]:
    """Of mmdet's own model, with the backbone and the neck of mmevm."""
    model = Config.fromfile(Path(mmdet.__file__).parent / f'.mim/configs/_base_/models/{kind}_r50_fpn.py').model
    model.backbone = dict(type='mmevm.EfficientViM', arch='m1')
    neck = dict(num_upsamples=1, add_extra_convs='on_input') if kind == 'retinanet' else dict(num_upsamples=2)
    model.neck = dict(type='mmevm.UpsampleFPN', in_channels=[128, 192, 320], out_channels=256, num_outs=5, **neck)
    for head in [model.bbox_head] if kind == 'retinanet' else [model.roi_head.bbox_head, model.roi_head.mask_head]:
        head.num_classes = num_classes
    return randomize(MMDET_MODELS.build(dict(model, _scope_='mmdet')).state_dict())


def authors_detector(kind: str, num_classes: int = 7) -> dict:
    state = OrderedDict()
    for name, tensor in authors_layout(detector_state(kind, num_classes)).items():
        if name.startswith('neck.pre_norms.'):
            tensor = tensor.reshape(1, -1, 1, 1)
        name = name.replace('neck.pre_norms.', 'neck.batch_norm.')
        name = name.replace('neck.upsample_convs.', 'neck.extra_trans_convs.')
        if match := re.fullmatch(r'neck\.upsample_fpn_convs\.(\d)(.*)', name):  # theirs count from the finest level
            upsamples = 1 if kind == 'retinanet' else 2
            name = f'neck.extra_fpn_convs.{upsamples - 1 - int(match[1])}{match[2]}'
        state[name] = tensor
    meta = {'mmdet_version': '2.25.0', 'CLASSES': ('cat', 'dog'), 'PALETTE': [HistoryBuffer()]}
    return {'meta': meta, 'state_dict': state, 'optimizer': {'state': {}}}


def assert_same(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(state) == set(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name


# Reading


@pytest.mark.parametrize('zipped', [True, False])
def test_reads_tensors_and_containers_and_no_other_class(tmp_path, zipped):
    path = authors_file(tmp_path / 'x.pth', _use_new_zipfile_serialization=zipped)
    content = read_checkpoint(path)
    assert_same(content['model_ema'], authors_layout(timm_state('efficientvim_m1', 1)))
    assert_same(content['model'], authors_layout(timm_state('efficientvim_m1', 0)))
    assert content['optimizer']['param_groups'] == [{'lr': 1e-3}]
    assert torch.equal(content['optimizer']['state'][0]['exp_avg'], torch.ones(2))
    assert content['epoch'] == 449
    assert not isinstance(content['config'], dict)
    assert not isinstance(content['args'], argparse.Namespace)


@pytest.mark.parametrize('zipped', [True, False])
def test_reads_what_torch_reads(tmp_path, zipped):
    attributed = torch.arange(3.0)
    attributed.note = 'kept aside'
    parameter = nn.Parameter(torch.ones(2))
    parameter.note = 'kept aside'
    shared = torch.arange(12.0).reshape(3, 4)
    content = {
        'dtypes': {
            str(d): torch.ones(2, dtype=d) for d in (torch.half, torch.bfloat16, torch.double, torch.long, torch.bool)
        },
        'views': [shared, shared.t(), shared[1:, ::2], torch.tensor(5), torch.empty(0, 3)],
        'parameters': (nn.Parameter(torch.zeros(2)), parameter, attributed),
        'plain': [1, -1.5, None, True, 'ü', 1 << 80, (1, [2]), {3}, frozenset({4}), {'a': {}}, 1j, torch.Size([2, 3])],
        'dtype': torch.bfloat16,
        'module': OrderedDict(nn.BatchNorm2d(3).state_dict()),
    }
    path = tmp_path / 'x.pth'
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(path)
    assert read['plain'] == content['plain']
    assert read['dtype'] is torch.bfloat16
    assert_same(read['dtypes'], content['dtypes'])
    assert_same(read['module'], content['module'])
    for key in ('views', 'parameters'):
        assert len(read[key]) == len(content[key])
        assert all(torch.equal(a, b) for a, b in zip(read[key], content[key], strict=True))


def gadgets(command: str, tmp_path: Path) -> dict[str, Call]:
    system = Call(getattr, Call(__import__, 'os'), 'system')
    nested = tmp_path / 'nested.pth'
    torch.save(Call(os.system, command), nested)
    hub = tmp_path / 'hub'
    hub.mkdir()
    (hub / 'hubconf.py').write_text(f'def run():\n    import os\n    os.system({command!r})\n')
    return {
        'system': Call(os.system, command),
        'eval': Call(builtins.eval, f'__import__("os").system({command!r})'),
        'exec': Call(builtins.exec, f'import os; os.system({command!r})'),
        'getattr': Call(system, command),
        'partial': Call(Call(functools.partial, os.system, command)),
        'popen': Call(subprocess.check_call, command, -1, None, None, None, None, None, True, True),
        'load_from_bytes': Call(torch.storage._load_from_bytes, nested.read_bytes()),
        'hub': Call(functools.partial(torch.hub.load, source='local'), str(hub), 'run'),
        'rebuild': Call(torch._tensor._rebuild_from_type_v2, os.system, torch.Tensor, (command,), {}),
    }


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize(
    'gadget', ['system', 'eval', 'exec', 'getattr', 'partial', 'popen', 'load_from_bytes', 'hub', 'rebuild']
)
def test_a_pickle_made_to_run_code_does_not(tmp_path, gadget, zipped):
    marker = tmp_path / 'marker'
    path = tmp_path / 'evil.pth'
    content = {'w': torch.ones(1), 'evil': gadgets(f'touch {marker}', tmp_path)[gadget]}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with contextlib.suppress(AttributeError):  # of 'rebuild', after it has run its call
        torch.load(path, weights_only=False)
    assert marker.exists(), 'the gadget itself does not work'
    marker.unlink()
    assert torch.equal(read_checkpoint(path)['w'], torch.ones(1))
    assert not marker.exists()


@pytest.mark.parametrize('name', ['torch._utils\n_rebuild_tensor_v2', 'collections\nOrderedDict', 'torch\nSize'])
def test_a_pickle_cannot_change_what_it_may_call(tmp_path, name):
    # GLOBAL name; BUILD with (None, {'changed': 1}), which sets attributes; then {'w': 1} as the content
    build = b'\x80\x02c' + name.encode() + b'\nN}U\x07changedK\x01s\x86b0}U\x01wK\x01s.'
    head = [torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {'little_endian': True}]
    path = tmp_path / 'evil.pth'
    path.write_bytes(b''.join(pickle.dumps(part, 2) for part in head) + build + pickle.dumps([], 2))
    assert read_checkpoint(path) == {'w': 1}
    module, function = name.split('\n')
    assert not hasattr(getattr(sys.modules[module], function), 'changed')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('zipped', [True, False])
def test_a_pickled_module_is_not_revived(tmp_path, zipped):
    path = tmp_path / 'x.pth'
    torch.save(nn.Linear(1, 1), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r'holds a torch\.nn\.modules\.linear\.Linear'):
        convert_checkpoint(read_checkpoint(path))


@pytest.mark.filterwarnings('ignore')
def test_a_torchscript_program_is_refused(tmp_path):
    path = tmp_path / 'x.pt'
    torch.jit.script(nn.Linear(1, 1)).save(str(path))
    with pytest.raises(CheckpointError, match='TorchScript program'):
        read_checkpoint(path)


def test_files_that_are_no_weights_are_refused_in_a_sentence(tmp_path):
    with pytest.raises(CheckpointError, match=r'no checkpoint .*missing\.pth'):
        read_checkpoint(tmp_path / 'missing.pth')
    with pytest.raises(CheckpointError, match='is a directory'):
        read_checkpoint(tmp_path)
    for content, message in {
        b'': 'is empty',
        b'<!DOCTYPE html><html><body>Not found</body></html>': 'web page in place',
        b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n': 'is text',
        b'\x89PNG\r\n\x1a\n' + bytes(100): 'no known format',
        pickle.dumps({'w': 1}): 'cannot be read',
    }.items():
        path = tmp_path / 'x.pth'
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as error:
            read_checkpoint(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize('layout', ['zip', 'legacy', 'safetensors'])
def test_a_truncated_file_is_refused(tmp_path, layout):
    path = tmp_path / 'x.pth'
    state = timm_state('efficientvim_m1')
    if layout == 'safetensors':
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=layout == 'zip')
    assert_same(read_checkpoint(path), state)
    content = path.read_bytes()
    for size in (40, len(content) // 2, len(content) - 5):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match='cut off or damaged'):
            read_checkpoint(path)


@pytest.mark.skipif(not hasattr(torch.serialization, 'set_crc32_options'), reason='of torch 2.6')
def test_reads_files_without_checksums(tmp_path):
    path = tmp_path / 'x.pth'
    state = {'w': torch.arange(5.0), 'v': torch.ones(2, 3)}
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_checkpoint(path), state)
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with pytest.raises(CheckpointError, match='cut off or damaged'):
        read_checkpoint(path)
    sizes = struct.pack('<II', 20, 20)  # of data/0, in the central directory
    assert content.count(sizes) >= 1
    path.write_bytes(content.replace(sizes, struct.pack('<II', 2**31, 2**31)))
    with pytest.raises(CheckpointError, match='records are larger than the file'):
        read_checkpoint(path)


HUGE = 10**13
LIES = {
    # A number of elements in the pickle: 256 (BININT2) becomes 10^13 (LONG1).
    'storage': (b'M\x00\x01', b'\x8a\x06' + HUGE.to_bytes(6, 'little')),
    'header': (b'[256],"data_offsets":[0,1024]', b'[%d],"data_offsets":[0,%d]' % (HUGE, 4 * HUGE)),
    'shape': (b'[256]', b'[%d]' % HUGE),
}


def save_lie(path: Path, layout: str) -> None:
    """Save a kilobyte that claims to hold a tensor of 10^13 elements."""
    kind, _, lie = layout.partition(', ')
    if lie in ('expanded', 'strided'):
        stored = torch.ones(256)
        huge = stored[:1].expand(HUGE) if lie == 'expanded' else stored.as_strided((1, 10**7, 10**6), (256, 0, 0))
        torch.save({'w': huge}, path, _use_new_zipfile_serialization=kind == 'zip')
    elif kind == 'safetensors':
        save_file({'w': torch.ones(256)}, path)
        data = path.read_bytes()
        (size,) = struct.unpack('<Q', data[:8])
        header = data[8 : 8 + size].replace(*LIES[lie])
        path.write_bytes(struct.pack('<Q', len(header)) + header + data[8 + size :])
    elif kind == 'legacy':
        torch.save({'w': torch.ones(256)}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes().replace(*LIES[lie]))
    else:
        torch.save({'w': torch.ones(256)}, path)
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, 'w') as archive:
            for name, data in records.items():
                archive.writestr(name, data.replace(*LIES[lie]) if name.endswith('data.pkl') else data)


@pytest.mark.skipif(sys.platform != 'linux', reason='limits the address space')
@pytest.mark.parametrize(
    'layout',
    [
        *('zip, storage', 'zip, expanded', 'zip, strided'),
        *('legacy, storage', 'legacy, expanded', 'legacy, strided'),
        *('safetensors, header', 'safetensors, shape'),
    ],
)
def test_small_file_that_describes_a_huge_tensor_is_refused_without_allocating(tmp_path, layout):
    import resource

    path = tmp_path / 'x.pth'
    save_lie(path, layout)
    assert path.stat().st_size < 4096
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path('/proc/self/statm').read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**26, limits[1]))
    try:
        for read in (read_checkpoint, functools.partial(read_checkpoint, map_location='meta')):
            with pytest.raises(CheckpointError, match='cut off or damaged') as error:
                read(path)
            assert str(path) in str(error.value)
            assert 'allocate' not in str(error.value)
            assert layout.startswith('safetensors') or re.search('needs 40000000000000 bytes', str(error.value))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize('zipped', [True, False])
def test_reads_expanded_tensors(tmp_path, zipped):
    path = tmp_path / 'x.pth'
    expected = {'row': torch.arange(5.0).expand(1000, 5), 'one': torch.ones(1, dtype=torch.bool).expand(3, 4)}
    torch.save(expected, path, _use_new_zipfile_serialization=zipped)
    assert_same(read_checkpoint(path), expected)


# Converting


@pytest.mark.parametrize('dist', ['', '_dist'])
@pytest.mark.parametrize('arch', ['m1', 'm2', 'm3', 'm4'])
def test_authors_classifiers(tmp_path, arch, dist):
    name = f'efficientvim_{arch}{dist}'
    checkpoint = read_checkpoint(authors_file(tmp_path / 'x.pth', name))
    images = torch.rand(2, 3, 96, 160)
    for weights, seed in {None: 1, 'ema': 1, 'model': 0}.items():
        converted, report = convert_checkpoint(checkpoint, weights)
        theirs = timm_state(name, seed)
        assert_same(
            converted['state_dict'],
            {('backbone.' if key.startswith(('patch', 'stages')) else 'head.') + key: t for key, t in theirs.items()},
        )
        assert (report.arch, report.weights) == (arch, 'model' if weights == 'model' else 'ema')
        assert "classifier of the authors'" in report.source
        assert set(report.renamed) == set(theirs)
        other = 'model_ema' if weights == 'model' else 'model'
        assert set(report.left_out) == {other, 'optimizer', 'epoch', 'config', 'args'}
        assert 'gone.CfgNode' in report.left_out['config']

    backbone = EfficientViM(arch).eval()
    prefix = len('backbone.')
    backbone.load_state_dict({k[prefix:]: v for k, v in converted['state_dict'].items() if k.startswith('backbone.')})
    with torch.no_grad():
        for ours, theirs in zip(backbone(images), timm_features(name, timm_state(name, 0), images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize('wrapper', [None, 'state_dict', 'model'])
def test_timms_classifier(wrapper):
    state = timm_state('efficientvim_m2_dist')
    checkpoint = {wrapper: state, 'epoch': 3} if wrapper else state
    converted, report = convert_checkpoint(checkpoint)
    expected = {('backbone.' if k.startswith(('patch', 'stages')) else 'head.') + k: t for k, t in state.items()}
    assert_same(converted['state_dict'], expected)
    assert (report.source, report.arch, report.reshaped) == ("a classifier in timm's layout", 'm2', [])
    assert set(report.left_out) == ({'epoch'} if wrapper else set())


@pytest.mark.parametrize(('weights', 'seed'), [(None, 1), ('ema', 1), ('model', 0)])
def test_a_training_checkpoint_of_timms(weights, seed):
    states = {'state_dict': timm_state('efficientvim_m1', 0), 'state_dict_ema': timm_state('efficientvim_m1', 1)}
    converted, report = convert_checkpoint({**states, 'arch': 'efficientvim_m1'}, weights)
    assert_same(converted['state_dict'], convert_checkpoint(timm_state('efficientvim_m1', seed))[0]['state_dict'])
    assert report.weights == ('model' if seed == 0 else 'ema')
    chosen, other = list(states) if seed == 0 else reversed(states)
    assert report.left_out == {
        other: f"'{chosen}' was chosen: {len(states[other])} entries",
        'arch': f"beside '{chosen}', which holds the weights: str",
    }


def test_an_entry_without_tensors_is_not_mistaken_for_the_weights():
    state = timm_state('efficientvim_m1')
    converted, report = convert_checkpoint(
        {'state_dict': state, 'model': {'type': 'a config'}, 'model_ema': {'rate': 1}}
    )
    assert_same(converted['state_dict'], convert_checkpoint(state)[0]['state_dict'])
    assert set(report.left_out) == {'model', 'model_ema'}


def test_the_weights_asked_for_must_exist():
    state = timm_state('efficientvim_m1')
    for checkpoint, weights in [
        ({'model': state}, 'ema'),
        ({'model_ema': state, 'model': None}, 'model'),
        ({'model_ema': state, 'model': {'type': 'a config'}}, 'model'),
        (state, 'ema'),
    ]:
        with pytest.raises(CheckpointError, match=f"no '{weights}' weights"):
            convert_checkpoint(checkpoint, weights)
    with pytest.raises(ValueError, match='choose'):
        convert_checkpoint(state, 'emma')


def test_data_parallel_prefix_dtype_and_class_count(tmp_path):
    plain = {}
    for name, tensor in authors_layout(timm_state('efficientvim_m1')).items():
        if name.startswith('heads.'):
            tensor = tensor[:10]
        plain[f'module.{name}'] = tensor.bfloat16() if tensor.is_floating_point() else tensor
    state = convert_checkpoint({'model': plain})[0]['state_dict']
    assert state['head.heads.3.weight'].shape == (10, 320)
    assert state['backbone.stages.0.blocks.0.norm.weight'].shape == (128,)
    for name, tensor in state.items():
        old = plain['module.' + name.removeprefix('backbone.').removeprefix('head.')]
        assert tensor.dtype == old.dtype == (torch.long if name.endswith('tracked') else torch.bfloat16)
        assert torch.equal(tensor.flatten(), old.flatten())


@pytest.mark.parametrize('kind', ['mask-rcnn', 'retinanet'])
def test_authors_detectors(tmp_path, kind):
    path = tmp_path / 'x.pth'
    torch.save(authors_detector(kind), path)
    converted, report = convert_checkpoint(read_checkpoint(path))
    assert_same(converted['state_dict'], detector_state(kind, 7))
    torch.save(converted, path)
    converted = torch.load(path, weights_only=True)
    assert converted['meta']['dataset_meta'] == {'classes': ('cat', 'dog')}
    assert (report.source, report.arch) == ("a detector of the authors'", 'm1')
    assert set(report.left_out) == {'meta', 'optimizer'}
    assert {name.split('.')[1] for name in report.renamed} == {'batch_norm', 'extra_trans_convs', 'extra_fpn_convs'}
    assert len(report.kept) + len(report.renamed) == len(converted['state_dict'])

    again, report = convert_checkpoint(converted)
    assert again['meta'] == converted['meta']
    assert_same(again['state_dict'], converted['state_dict'])
    assert not report.renamed
    assert not report.reshaped


def authors_neck(state: dict[str, torch.Tensor], maps: list[torch.Tensor], upsamples: int) -> list[torch.Tensor]:
    """The authors' neck in plain operators (FACTS.md, section 3). Return its levels, finest first."""

    def conv(name: str, x: torch.Tensor, **kwargs) -> torch.Tensor:
        return F.conv2d(x, state[f'neck.{name}.conv.weight'], state[f'neck.{name}.conv.bias'], **kwargs)

    normed = []
    for i, x in enumerate(maps):
        variance, mean = torch.var_mean(x, dim=1, keepdim=True, unbiased=False)
        x = (x - mean) / (variance + 1e-5).sqrt()
        normed.append(x * state[f'neck.batch_norm.{i}.weight'] + state[f'neck.batch_norm.{i}.bias'])
    laterals = [conv(f'lateral_convs.{i}', x) for i, x in enumerate(normed)]
    for i in (1, 0):
        laterals[i] = laterals[i] + F.interpolate(laterals[i + 1], size=laterals[i].shape[2:], mode='nearest')
    finer = [laterals[0]]  # finest first
    for i in range(upsamples):
        weight, bias = (state[f'neck.extra_trans_convs.{i}.conv.{leaf}'] for leaf in ('weight', 'bias'))
        finer.insert(0, F.conv_transpose2d(finer[0], weight, bias, stride=2))
    levels = [conv(f'extra_fpn_convs.{i}', finer[i], padding=1) for i in range(upsamples)]
    levels += [conv(f'fpn_convs.{i}', x, padding=1) for i, x in enumerate(laterals)]
    if 'neck.fpn_convs.3.conv.weight' in state:
        return [*levels, conv('fpn_convs.3', normed[-1], stride=2, padding=1)]
    return levels


@pytest.mark.parametrize('coarser', [False, True])
@pytest.mark.parametrize('upsamples', [1, 2, 3])
def test_converted_neck_gives_the_levels_of_the_authors_neck(upsamples, coarser):
    channels, width = [128, 192, 320], 16
    shapes = {}
    for i, c in enumerate(channels):
        shapes[f'batch_norm.{i}.weight'] = shapes[f'batch_norm.{i}.bias'] = (1, c, 1, 1)
        shapes[f'lateral_convs.{i}.conv.weight'] = (width, c, 1, 1)
        shapes[f'fpn_convs.{i}.conv.weight'] = (width, width, 3, 3)
    if coarser:
        shapes['fpn_convs.3.conv.weight'] = (width, channels[-1], 3, 3)
    for i in range(upsamples):
        shapes[f'extra_trans_convs.{i}.conv.weight'] = (width, width, 2, 2)
        shapes[f'extra_fpn_convs.{i}.conv.weight'] = (width, width, 3, 3)
    shapes |= {name.replace('weight', 'bias'): (width,) for name in shapes if '.conv.' in name}
    generator = torch.Generator().manual_seed(0)
    neck_state = {f'neck.{name}': torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    backbone = authors_layout(detector_state('mask-rcnn', 7))
    backbone = {name: tensor for name, tensor in backbone.items() if name.startswith('backbone.')}
    converted, report = convert_checkpoint({'state_dict': {**backbone, **neck_state}})

    assert sum(name.startswith('neck.extra_') for name in report.renamed) == 4 * upsamples
    for i in range(upsamples):
        new = f'neck.upsample_fpn_convs.{upsamples - 1 - i}.conv.weight'
        assert report.renamed[f'neck.extra_fpn_convs.{i}.conv.weight'] == new
        assert f'\n  neck.extra_fpn_convs.{i}.* -> neck.upsample_fpn_convs.{upsamples - 1 - i}.* (2)\n' in str(report)

    neck = UpsampleFPN(channels, width, upsamples + 3 + coarser, upsamples, 'on_input' if coarser else False)
    state = converted['state_dict']
    neck.load_state_dict({name[5:]: tensor for name, tensor in state.items() if name.startswith('neck.')})
    maps = [torch.randn(2, c, *size) for c, size in zip(channels, [(9, 13), (5, 7), (3, 4)], strict=True)]
    with torch.no_grad():
        levels = neck(maps)
    expected = authors_neck(neck_state, maps, upsamples)
    assert len(levels) == len(expected) == 3 + upsamples + coarser
    for ours, theirs in zip(levels, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_a_missing_output_convolution_of_the_authors_is_named_by_its_new_index():
    state = dict(authors_detector('mask-rcnn')['state_dict'])
    del state['neck.extra_fpn_convs.1.conv.bias']
    del state['neck.extra_fpn_convs.1.conv.weight']
    with pytest.raises(CheckpointError, match=r'2 missing \(neck\.upsample_fpn_convs\.0\.conv'):
        convert_checkpoint({'state_dict': state})


def test_faster_rcnn_needs_no_masks():
    state = {k: v for k, v in authors_detector('mask-rcnn')['state_dict'].items() if 'mask_head' not in k}
    assert len(convert_checkpoint({'state_dict': state})[0]['state_dict']) == len(state)


def test_converting_a_converted_classifier_changes_nothing(tmp_path):
    converted, _ = convert_checkpoint(read_checkpoint(authors_file(tmp_path / 'x.pth')))
    torch.save(converted, tmp_path / 'y.pth')
    again, report = convert_checkpoint(torch.load(tmp_path / 'y.pth', weights_only=True))
    assert again['meta'] == converted['meta']
    assert_same(again['state_dict'], converted['state_dict'])
    assert not report.renamed
    assert not report.reshaped


CLASSIFIER_NAMES = [
    'patch_embed.conv.0.norm.num_batches_tracked',
    'stages.0.blocks.1.mixer.A',
    'stages.1.downsample.conv.2.fc1.bias',
    'stages.2.blocks.0.alpha',
    'norm.3.bias',
    'weights',
    'heads.2.bias',
    'heads_dist.0.weight',
]
DETECTOR_NAMES = [
    'backbone.stages.2.blocks.1.norm.bias',
    'neck.lateral_convs.1.conv.bias',
    'neck.batch_norm.0.weight',
    'neck.extra_trans_convs.0.conv.bias',
    'neck.extra_fpn_convs.0.conv.weight',
    'neck.fpn_convs.3.conv.weight',
    'bbox_head.retina_cls.weight',
    'bbox_head.cls_convs.2.conv.bias',
]


@pytest.mark.parametrize('harm', ['missing', 'shape', 'kind'])
@pytest.mark.parametrize('name', [*CLASSIFIER_NAMES, *DETECTOR_NAMES])
def test_a_missing_or_misshapen_tensor_is_an_error(name, harm):
    is_classifier = name in CLASSIFIER_NAMES
    state = timm_state('efficientvim_m1_dist') if is_classifier else authors_detector('retinanet')['state_dict']
    state = authors_layout(state)
    convert_checkpoint({'state_dict': state})
    if harm == 'missing':
        del state[name]
    else:
        state[name] = torch.ones(3, 5) if harm == 'shape' else 'no tensor'
    with pytest.raises(CheckpointError, match='EfficientViM-M1') as error:
        convert_checkpoint({'state_dict': state})
    assert "mmevm's own" not in str(error.value)
    new = (
        name.replace('batch_norm', 'pre_norms').replace('extra_trans', 'upsample').replace('extra_fpn', 'upsample_fpn')
    )
    if name != 'neck.fpn_convs.3.conv.weight':  # without it the neck is another one, whose bias is unknown
        count = len(detector_state('retinanet', 7) if not is_classifier else timm_state('efficientvim_m1_dist'))
        problem = (
            rf'1 of another shape \(\S*{new}: \(.*\) expected, \(3, 5\)'
            if harm == 'shape'
            else rf'1 missing \(\S*{new}\)'
        )
        assert re.search(rf'of {count} tensors, {problem}[^;]*\. Nothing', str(error.value))


@pytest.mark.parametrize(
    'name',
    [
        'scales',
        'stages.0.blocks.2.alpha',
        'stages.3.blocks.0.alpha',
        'norm.4.bias',
        'neck.what.0.conv.bias',
        'mask_head.x',
    ],
)
def test_an_unknown_tensor_is_an_error(name):
    state = dict(authors_layout(timm_state('efficientvim_m1')))
    state[name] = torch.ones(1)
    with pytest.raises(CheckpointError, match=r'1 unknown \(.*' + name.replace('.', r'\.')):
        convert_checkpoint(state)


@pytest.mark.parametrize(
    ('kind', 'name'),
    [
        ('mask-rcnn', 'roi_head.bbox_head.fc_cls.bias'),
        ('retinanet', 'bbox_head.retina_cls.bias'),
        ('retinanet', 'neck.lateral_convs.0.conv.bias'),
        ('classifier', 'head.heads.0.bias'),
    ],
)
def test_without_what_tells_its_size_a_network_is_one_of_coco_or_imagenet(kind, name):
    whole = convert_checkpoint(timm_state('efficientvim_m1'))[0]['state_dict']
    state = dict(whole if kind == 'classifier' else detector_state(kind, 80))
    del state[name]
    with pytest.raises(CheckpointError, match=rf'of {len(state) + 1} tensors, 1 missing \({name}\)\. .* used as it is'):
        convert_checkpoint({'state_dict': state})


@pytest.mark.parametrize(
    ('finer', 'extra', 'levels', 'channels'),
    [(0, False, 3, 256), (1, False, 3, 48), (2, 'on_input', 4, 32), (1, 'on_output', 4, 320), (0, 'on_output', 5, 24)],
)
def test_necks_of_any_number_of_levels(finer, extra, levels, channels):
    neck = UpsampleFPN(
        in_channels=[128, 192, 320],
        out_channels=channels,
        num_outs=finer + levels,
        num_upsamples=finer,
        add_extra_convs=extra,
    )
    state = {
        key: tensor for key, tensor in timm_state('efficientvim_m1').items() if key.startswith(('patch', 'stages'))
    }
    state |= {f'neck.{key}': tensor for key, tensor in neck.state_dict().items()}
    seed = torch.random.get_rng_state()
    converted, _ = convert_checkpoint(state)
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert len(converted['state_dict']) == len(state)
    last = max(key for key in state if key.startswith('neck.') and key.endswith('bias'))
    for problem, changed in [
        ('missing', {key: tensor for key, tensor in state.items() if key != last}),
        ('unknown', state | {last.replace('bias', 'scale'): state[last]}),
    ]:
        with pytest.raises(CheckpointError, match=rf'1 {problem} \({last[:-4]}'):
            convert_checkpoint(changed)


@pytest.mark.parametrize(
    ('wrapper', 'weights'),
    [(None, None), ('state_dict', None), ('model', 'model'), ('model_ema', 'ema'), ('state_dict_ema', 'ema')],
)
@pytest.mark.parametrize('part', ['classifier', 'backbone', 'whole'])
@pytest.mark.parametrize('theirs', [True, False])
def test_the_report_says_what_became_of_each_entry(wrapper, weights, part, theirs):
    plain = timm_state('efficientvim_m1')
    if part != 'classifier':
        plain = {name: tensor for name, tensor in plain.items() if name not in head_of(plain)}
    state = authors_layout(plain) if theirs else dict(plain)
    if part == 'whole':
        state = {f'backbone.{name}': tensor for name, tensor in state.items()}
    others = {'epoch': 3, 'log': [1, 2], 'meta': {}}
    converted, report = convert_checkpoint({wrapper: state, **others} if wrapper else {**state, 7: 'x', **others})
    source = {True: "a {} of the authors'", False: "a {} in timm's layout"}[theirs].format(part)
    if part == 'whole':
        source = "a detector of the authors'" if theirs else "a checkpoint of mmevm's"
    assert converted['meta'] == {'source': source, 'arch': 'm1', 'weights': weights}
    assert (report.source, report.arch, report.weights) == (source, 'm1', weights)
    why = f"beside '{wrapper}', which holds the weights: " if wrapper else 'not a named tensor, but '
    assert report.left_out == {
        **({} if wrapper else {'7': why + 'str'}),
        **{'epoch': why + 'int', 'log': why + '2 entries', 'meta': why + '0 entries'},
    }
    prefixed = {
        name: ('' if part == 'whole' else 'head.' if name in head_of(state) else 'backbone.') + name for name in state
    }
    assert report.renamed == ({} if part == 'whole' else prefixed)
    assert report.kept == (list(state) if part == 'whole' else [])
    assert report.reshaped == [prefixed[name] for name in state if theirs and state[name].dim() > 2 and 'norm' in name]


def test_the_report_in_words():
    report = ConversionReport(
        source="a classifier of the authors'",
        arch='m4',
        weights='ema',
        kept=['head.norm.0.bias', 'head.norm.0.weight'],
        renamed={
            'stages.0.blocks.1.alpha': 'backbone.stages.0.blocks.1.alpha',
            'stages.1.blocks.0.alpha': 'backbone.stages.1.blocks.0.alpha',
            'weights': 'head.weights',
            'neck.batch_norm.0.bias': 'neck.pre_norms.0.bias',
        },
        reshaped=['neck.pre_norms.0.bias'],
        left_out={'epoch': 'not a named tensor, but int'},
    )
    words = """
recognised: a classifier of the authors', EfficientViM-M4, ema weights
loaded: 6 tensors, 1 of them LayerNorms made 1-D
renamed: 4
  stages.* -> backbone.stages.* (2)
  weights -> head.weights (1)
  neck.batch_norm.* -> neck.pre_norms.* (1)
left out: 1
  epoch: not a named tensor, but int"""
    assert str(report) == words.strip()
    assert 'EfficientViM-M4\nloaded' in str(dataclasses.replace(report, weights=None))


@pytest.mark.parametrize(
    ('meta', 'kept'),
    [
        ({'CLASSES': ['cat'], 'PALETTE': [(1, 2, 3)]}, {'classes': ['cat'], 'palette': [(1, 2, 3)]}),
        (
            {'dataset_meta': {'classes': ('cat',), 'palette': 'coco', 'more': 1}},
            {'classes': ('cat',), 'palette': 'coco'},
        ),
        ({'dataset_meta': {'classes': ('cat',), 'palette': [(None,)]}, 'CLASSES': ('dog',)}, {'classes': ('cat',)}),
        ({'dataset_meta': {'classes': (torch.zeros(1),), 'palette': 'coco'}}, None),
        ({'dataset_meta': {'classes': 'cat'}}, None),
        ({'dataset_meta': ['cat']}, None),
        ({'PALETTE': [(1, 2, 3)]}, None),
        ('of nobody', None),
    ],
)
def test_the_names_of_the_classes_stay(meta, kept):
    converted, _ = convert_checkpoint({'state_dict': timm_state('efficientvim_m1'), 'meta': meta})
    assert converted['meta'].pop('dataset_meta', None) == kept
    assert converted['meta'] == {'source': "a classifier in timm's layout", 'arch': 'm1', 'weights': None}


def test_a_sentence_names_four_at_most():
    four = {f'a{i}': torch.ones(1) for i in range(4)}
    with pytest.raises(CheckpointError, match=r'their names are a0, a1, a2, a3, but .*patch_embed'):
        convert_checkpoint(four)
    with pytest.raises(CheckpointError, match=r'their names are a0, a1, a2, a3, …, but'):
        convert_checkpoint(four | {'a4': torch.ones(1)})
    with pytest.raises(CheckpointError, match='no tensors in this file, only epoch'):
        convert_checkpoint({'epoch': 1})
    with pytest.raises(CheckpointError, match='which has model: '):
        convert_checkpoint({'model': four}, 'ema')
    with pytest.raises(CheckpointError, match='which has one set without a name: '):
        convert_checkpoint(four, 'ema')


def test_two_names_for_one_tensor_are_an_error(tmp_path):
    state = dict(timm_state('efficientvim_m1'))
    state['backbone.stages.0.blocks.0.alpha'] = state['stages.0.blocks.0.alpha'] + 1
    torch.save(state, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'1 tensors .* two names.*backbone\.stages\.0\.blocks\.0\.alpha'):
        convert_checkpoint(state)
    with pytest.raises(CheckpointError, match='two names'):
        load_pretrained(EfficientViM('m1'), str(tmp_path / 'x.pth'))


def test_a_detector_needs_mmdet_and_a_classifier_does_not(monkeypatch):
    monkeypatch.setattr('mmevm.checkpoints.convert.find_spec', lambda name: None)
    convert_checkpoint(timm_state('efficientvim_m1'))
    with pytest.raises(CheckpointError, match='install that first'):
        convert_checkpoint(authors_detector('retinanet'))
    with pytest.raises(CheckpointError, match='install that first'):
        convert_checkpoint({'backbone.patch_embed.x': torch.ones(1), 'neck.x': torch.ones(1)})


def test_other_networks_and_odd_contents_are_refused():
    with pytest.raises(CheckpointError, match='no weights of EfficientViM'):
        convert_checkpoint(nn.Linear(2, 2).state_dict())
    with pytest.raises(CheckpointError, match='no tensors'):
        convert_checkpoint({'epoch': 3})
    with pytest.raises(CheckpointError, match='holds a list'):
        convert_checkpoint([1])


# Loading into a backbone


@pytest.mark.parametrize('layout', ['authors', 'timm', 'safetensors', 'converted', 'backbone', 'distributed'])
def test_a_backbone_receives_every_tensor(tmp_path, layout):
    state = timm_state('efficientvim_m1', 1)
    path = tmp_path / 'x.pth'
    if layout == 'safetensors':
        save_file(state, path)
    elif layout in ('authors', 'distributed'):
        authors_file(path, prefix='module.' if layout == 'distributed' else '')
    elif layout == 'converted':
        torch.save(convert_checkpoint(state)[0], path)
    else:
        torch.save({k: v for k, v in state.items() if layout == 'timm' or k.startswith(('patch', 'stages'))}, path)
    backbone = MODELS.build(
        dict(type='mmevm.EfficientViM', arch='m1', init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    )
    backbone.init_weights()
    assert_same(backbone.state_dict(), {k: v for k, v in state.items() if k.startswith(('patch', 'stages'))})

    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for ours, theirs in zip(backbone.eval()(images), timm_features('efficientvim_m1', state, images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def test_from_a_detector_with_and_without_prefix(tmp_path):
    path = tmp_path / 'x.pth'
    torch.save(authors_detector('retinanet'), path)
    expected = {k[9:]: v for k, v in detector_state('retinanet', 7).items() if k.startswith('backbone.')}
    for prefix in (None, 'backbone', 'backbone.'):
        backbone = EfficientViM('m1')
        load_pretrained(backbone, str(path), prefix=prefix)
        assert_same(backbone.state_dict(), expected)
    torch.save({f'teacher.{k}': v for k, v in authors_detector('retinanet')['state_dict'].items()}, path)
    backbone = EfficientViM('m1')
    load_pretrained(backbone, str(path), prefix='teacher.backbone.')
    assert_same(backbone.state_dict(), expected)


def test_a_backbone_of_fewer_stages_or_of_another_arch(tmp_path):
    state = timm_state('efficientvim_m1')
    path = tmp_path / 'x.pth'
    torch.save(state, path)
    backbone = EfficientViM('m1', out_indices=(0, 1))
    load_pretrained(backbone, str(path))
    assert_same(backbone.state_dict(), {k: state[k] for k in backbone.state_dict()})

    own = EfficientViM(dict(embed_dims=(16, 24), depths=(1, 1), state_dims=(4, 4)), out_indices=(0, 1))
    expected = randomize(own.state_dict())
    torch.save({'state_dict': {f'backbone.{k}': v for k, v in expected.items()}}, path)
    load_pretrained(own, str(path))
    assert_same(own.state_dict(), expected)


@pytest.mark.parametrize('how', ['Pretrained', 'mmengine.Pretrained', PretrainedInit])
def test_nothing_received_is_an_error_however_it_is_asked_for(tmp_path, how):
    torch.save({'state_dict': {'layer.weight': torch.zeros(1)}}, tmp_path / 'x.pth')
    backbone = EfficientViM('m1', init_cfg=dict(type=how, checkpoint=str(tmp_path / 'x.pth')))
    with pytest.raises(CheckpointError, match=r'0 of the \d+ tensors'):
        backbone.init_weights()


def load_error(path: Path, checkpoint: dict, prefix: str | None = None, **kwargs) -> str:
    torch.save(checkpoint, path)
    backbone = EfficientViM(**{'arch': 'm1', **kwargs})
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_pretrained(backbone, str(path), prefix=prefix)
    assert_same(backbone.state_dict(), before)
    assert 'init_cfg=None' in str(error.value)
    return str(error.value)


def test_a_backbone_that_does_not_receive_everything_is_an_error(tmp_path):
    path = tmp_path / 'x.pth'
    state = timm_state('efficientvim_m1')
    total = len(EfficientViM('m1').state_dict())

    message = load_error(path, state, prefix='teacher.')
    assert f"0 of the {total} tensors of EfficientViM under the prefix 'teacher.'" in message
    assert 'init_cfg.prefix' in message
    assert '0 of the' in load_error(path, nn.Linear(2, 2).state_dict())

    message = load_error(path, {k: v for k, v in state.items() if not k.endswith('mixer.A')})
    assert f'{total - 6} of the {total}' in message
    assert '6 missing (stages.0.blocks.0.mixer.A' in message
    assert '1 missing (stages.2.blocks.1.dwconv2.norm.num_batches_tracked)' in load_error(
        path, {k: v for k, v in state.items() if k != 'stages.2.blocks.1.dwconv2.norm.num_batches_tracked'}
    )

    message = load_error(path, state, arch='m2')
    assert 'stages.1.blocks.0.alpha' in message or 'of another shape' in message
    assert '(4, 256) expected, (4, 192) in the file' in message or 'Make sure that arch' in message

    message = load_error(path, state, in_channels=4)
    assert 'patch_embed.conv.0.conv.weight: (16, 4, 3, 3) expected, (16, 3, 3, 3) in the file' in message
    assert 'in_channels' in message.split('. ', 1)[1]


def test_the_advice_fits_what_is_wrong(tmp_path):
    path = tmp_path / 'x.pth'
    state = timm_state('efficientvim_m1')
    names = ', '.join(list(state)[:4])
    assert f'The names in the file are {names}, …: give their prefix' in load_error(path, state, prefix='student')
    assert 'images of 4 channels (in_channels), the pretrained one of 3: ' in load_error(path, state, in_channels=4)
    for other in ({}, {'patch_embed.conv.0.conv.weight': torch.ones(())}):
        message = load_error(path, {'stages.0.x': torch.ones(1), **other})
        assert 'Make sure that arch' in message
        assert 'under the prefix' in message


def test_what_was_loaded_and_what_was_not_is_logged(tmp_path, log):
    path = authors_file(tmp_path / 'x.pth')
    backbone = EfficientViM('m1')
    log.clear()
    load_pretrained(backbone, str(path))
    state = timm_state('efficientvim_m1')
    count = len(backbone.state_dict())
    beyond = 'head.weights, head.norm.0.weight, head.norm.0.bias, head.norm.1.weight'
    assert log.messages == [
        f"{count} of {count} tensors of EfficientViM loaded from {path} (its 'ema' weights).",
        f'{path} holds {len(state) - count} tensors beyond EfficientViM, not used: {beyond}, ….',
    ]
    torch.save({f'backbone.{name}': tensor for name, tensor in backbone.state_dict().items()}, path)
    log.clear()
    load_pretrained(backbone, str(path))
    assert log.messages == [f'{count} of {count} tensors of EfficientViM loaded from {path}.']


def test_which_initialisations_are_of_a_checkpoint():
    ours = dict(checkpoint='x.pth', prefix='backbone.')
    cfg = dict(type='Pretrained', **ours)
    assert pretrained_cfgs(None) == pretrained_cfgs([]) == pretrained_cfgs({}) == []
    assert pretrained_cfgs(dict(type='Kaiming', layer='Conv2d')) == []
    assert pretrained_cfgs(cfg) == [ours]
    several = [dict(type='Kaiming', layer='Conv2d'), cfg, {}, dict(type=PretrainedInit, checkpoint='y.pth')]
    assert pretrained_cfgs(several) == [ours, dict(checkpoint='y.pth')]


# Loading into any model


def small_model(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(2, classes), nn.BatchNorm1d(classes))


@pytest.fixture
def whole(tmp_path):
    """A file of all of a small model, and what it holds."""
    content = {'state_dict': randomize(small_model().state_dict()), 'meta': {'epoch': 1}}
    torch.save(content, tmp_path / 'x.pth')
    return str(tmp_path / 'x.pth'), content['state_dict']


def test_a_whole_model_receives_every_tensor(whole, log):
    path, state = whole
    model = small_model()
    assert load_strict(model, path)['meta'] == {'epoch': 1}
    assert_same(model.state_dict(), state)
    assert log.messages == [f'7 of 7 tensors of Sequential loaded from {path}.']


@pytest.mark.parametrize(
    ('change', 'problem'),
    [
        (lambda state: state.pop('0.bias'), r'which has 7 tensors: 1 missing \(0\.bias\)\. '),
        (lambda state: state.update({'2.bias': torch.ones(1)}), r'7 tensors: 1 unknown to the model \(2\.bias\)\. '),
        (lambda state: state.update({'0.bias': torch.ones(4)}), r'0\.bias: \(3,\) expected, \(4,\) in the file\)\. '),
        (lambda state: state.update({'0.bias': torch.full((3,), torch.inf)}), r'NaN or infinite numbers \(0\.bias\)'),
        (lambda state: state.update({'0.bias': torch.ones(3).int()}), r'type torch\.int32'),
        (lambda state: state.clear(), 'no tensors in this file'),
    ],
)
def test_a_whole_model_receives_everything_or_nothing(whole, change, problem):
    path, state = whole
    change(state)
    torch.save({'state_dict': state}, path)
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=problem) as error:
        load_strict(model, path)
    assert path in str(error.value)
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize(('classes', 'level', 'count'), [(3, 'INFO', 7), (4, 'WARNING', 5)])
def test_how_much_of_a_model_starts_from_a_file_is_logged(whole, log, classes, level, count):
    path, state = whole
    check_partial(nn.Sequential(nn.Linear(2, classes), nn.BatchNorm1d(3)), {'state_dict': state}, path)
    (record,) = log.records
    assert record.levelname == level
    said = f'{count} of 7 tensors of Sequential start from {path}.'
    if classes == 3:
        assert record.message == said
    else:
        others = ' Others keep the weights that they have without it: 2 of another shape (0.weight: (4, 2) expected,'
        assert record.message.startswith(said + others)


def test_a_model_does_not_start_from_nothing_or_from_numbers_of_no_use(whole):
    path, state = whole
    with pytest.raises(
        CheckpointError, match=r'nothing of Sequential, which has 7 tensors: 6 missing .* called net\.0\.'
    ):
        check_partial(small_model(), {f'net.{name}': tensor for name, tensor in state.items()}, path)
    with pytest.raises(CheckpointError, match=r'nothing of Sequential, .*6 of another shape'):  # but a counter
        check_partial(small_model(4), state, path)
    for content, problem in [([], 'holds a list'), (state | {'0.bias': torch.full((3,), torch.nan)}, 'NaN')]:
        with pytest.raises(CheckpointError, match=problem) as error:
            check_partial(small_model(), content, path)
        assert path in str(error.value)
    check_partial(small_model(), {**state, 'else': torch.tensor(torch.nan)}, path)  # is not used


TINY = dict(
    type='mmevm.EfficientViM', arch=dict(embed_dims=(16, 24), depths=(1, 1), state_dims=(4, 4)), out_indices=(0, 1)
)


def tiny_detectors() -> tuple[nn.Module, nn.Module]:
    """Return mmdet's Faster R-CNN, and a SoftTeacher that trains two of it."""
    models = Path(mmdet.__file__).parent / '.mim/configs/_base_/models'
    detector = Config.fromfile(models / 'faster-rcnn_r50_fpn.py').model
    detector.backbone = TINY
    detector.neck = dict(type='mmevm.UpsampleFPN', in_channels=[16, 24], out_channels=8, num_outs=5)
    detector.rpn_head.update(in_channels=8, feat_channels=8)
    detector.roi_head.bbox_roi_extractor.out_channels = 8
    detector.roi_head.bbox_head.update(in_channels=8, fc_out_channels=8)
    preprocessor = dict(type='MultiBranchDataPreprocessor', data_preprocessor=detector.data_preprocessor)
    semi = dict(freeze_teacher=True, cls_pseudo_thr=0.9)
    cfg = dict(type='SoftTeacher', detector=detector, data_preprocessor=preprocessor, semi_train_cfg=semi)
    with torch.random.fork_rng():
        return tuple(MMDET_MODELS.build(dict(model, _scope_='mmdet')) for model in (detector, cfg))


def test_a_model_that_renames_keys_while_loading_starts_from_them(tmp_path, log):
    detector, soft_teacher = tiny_detectors()
    state = randomize(detector.state_dict())
    before = {name: tensor.clone() for name, tensor in soft_teacher.state_dict().items()}
    log.clear()
    check_partial(soft_teacher, {'state_dict': state}, 'x.pth')
    assert log.messages == [f'{2 * len(state)} of {2 * len(state)} tensors of SoftTeacher start from x.pth.']
    assert_same(soft_teacher.state_dict(), before)  # mmengine loads them after the check

    torch.save({'state_dict': state}, tmp_path / 'x.pth')
    load_strict(soft_teacher, str(tmp_path / 'x.pth'))
    assert_same(soft_teacher.teacher.state_dict(), state)
    assert_same(soft_teacher.student.state_dict(), state)

    for harm, problem in [
        (
            {'neck.fpn_convs.0.conv.bias': torch.ones(3)},
            r'2 of another shape .*teacher\.neck\.fpn_convs\.0\.conv\.bias: \(8',
        ),
        ({'neck.fpn_convs.0.conv.bias': torch.full((8,), torch.nan)}, r'NaN .*teacher\.neck\.fpn_convs\.0\.conv\.bias'),
        ({'surprise': torch.ones(1)}, r'2 unknown to the model .*teacher\.surprise'),
    ]:
        torch.save({'state_dict': {**state, **harm}}, tmp_path / 'x.pth')
        with pytest.raises(CheckpointError, match=problem):
            load_strict(soft_teacher, str(tmp_path / 'x.pth'))
    with pytest.raises(CheckpointError, match='has nothing of SoftTeacher'):
        check_partial(soft_teacher, {f'net.{name}': tensor for name, tensor in state.items()}, 'x.pth')


def test_a_training_of_a_model_that_renames_keys_starts_from_them(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, 'collect_env', dict)
    detector, soft_teacher = tiny_detectors()
    state = randomize(detector.state_dict())
    torch.save({'state_dict': state}, tmp_path / 'x.pth')
    made = Runner(
        soft_teacher,
        str(tmp_path),
        load_from=f'safe://{tmp_path}/x.pth',
        custom_hooks=[dict(type='mmevm.CheckpointCheckHook')],
        experiment_name=str(tmp_path),
    )
    made.load_or_resume()
    assert_same(soft_teacher.teacher.state_dict(), state)
    assert_same(soft_teacher.student.state_dict(), state)


class Masked(nn.Sequential):
    """A model with buffers that are no statistics, one of them infinite, and complex weights."""

    def __init__(self, *, ids: bool = True) -> None:
        super().__init__(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.frequencies = nn.Parameter(torch.ones(2, dtype=torch.complex64))
        self.register_buffer('mask', torch.full((3,), -torch.inf))
        if ids:
            self.register_buffer('position_ids', torch.arange(3))


@pytest.mark.parametrize('load', [load_strict, lambda model, path: check_partial(model, torch.load(path), path)])
def test_buffers_may_hold_anything(tmp_path, log, load):
    path = str(tmp_path / 'x.pth')
    state = Masked().state_dict()
    torch.save(state, path)
    load(Masked(), path)
    torch.save(state | {'mask': torch.ones(3).bool()}, path)
    load(Masked(), path)
    assert {record.levelname for record in log.records} == {'INFO'}
    for name, value, problem in [
        ('1.running_var', torch.full((3,), torch.inf), 'infinite'),
        ('1.running_mean', torch.full((3,), torch.nan), 'NaN'),
        ('1.running_mean', torch.ones(3).int(), 'int32'),
        ('frequencies', torch.full((2,), torch.nan, dtype=torch.complex64), 'NaN'),
        ('0.weight', torch.full((3, 2), 1e300, dtype=torch.double), 'infinite'),
    ]:
        torch.save(state | {name: value}, path)
        with pytest.raises(CheckpointError, match=rf'{problem}.*\({name}\)'):
            load(Masked(), path)


def test_a_constant_buffer_more_or_less_is_a_warning(tmp_path, log):
    path = str(tmp_path / 'x.pth')
    for saved, loaded in [(True, False), (False, True)]:  # as after transformers has made its position_ids transient
        log.clear()
        torch.save(Masked(ids=saved).state_dict(), path)
        load_strict(Masked(ids=loaded), path)
        warning, info = log.records
        assert (warning.levelname, info.levelname) == ('WARNING', 'INFO')
        assert warning.message.startswith(f'{path}: 1 buffers')
        assert '(position_ids)' in warning.message
    torch.save({name: t for name, t in small_model().state_dict().items() if 'num_batches' not in name}, path)
    log.clear()
    load_strict(small_model(), path)
    assert [record.levelname for record in log.records] == ['INFO']


def test_a_model_whose_names_differ_in_its_state_dict(tmp_path, log):
    """mmpretrain's TimmClassifier adds a prefix while loading, and removes it from its state dict."""
    cfg = dict(type='TimmClassifier', model_name='efficientvim_m1', pretrained=False, _scope_='mmpretrain')
    state = timm_state('efficientvim_m1')
    torch.save(state, tmp_path / 'x.pth')
    model = MODELS.build(cfg)
    log.clear()
    load_strict(model, str(tmp_path / 'x.pth'))
    assert_same(model.model.state_dict(), state)
    check_partial(model, state, 'x.pth')
    assert [record.levelname for record in log.records] == ['INFO', 'INFO']
    torch.save({name: tensor for name, tensor in state.items() if name != 'norm.0.bias'}, tmp_path / 'x.pth')
    with pytest.raises(CheckpointError, match=r'1 missing \(model\.norm\.0\.bias\)'):
        load_strict(model, str(tmp_path / 'x.pth'))


class OwnLoading(nn.Module):
    """Delegates loading to its network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 3)

    def state_dict(self, *args, **kwargs):
        return self.net.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict, strict=True):
        return self.net.load_state_dict(state_dict, strict)


class WritingData(nn.Linear):
    """Writes what it loads past autograd, which counts the other writes."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.weight.data.copy_(state_dict[f'{prefix}weight'])
        self.bias.data.copy_(state_dict[f'{prefix}bias'])


class Indexed(nn.Linear):
    """Has a parameter of integers."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.index = nn.Parameter(torch.arange(3), requires_grad=False)


@pytest.mark.parametrize('model', [OwnLoading(), WritingData(2, 3), Indexed(2, 3)])
def test_models_that_load_in_unusual_ways_are_loaded(tmp_path, log, model):
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / 'x.pth')
    check_partial(model, state, 'x.pth')
    load_strict(model, str(tmp_path / 'x.pth'))
    assert_same(model.state_dict(), state)
    assert {record.levelname for record in log.records} == {'INFO'}


def test_versions_of_layers_are_kept_for_loading(tmp_path):
    """Layers of mmdet and torch rename or add what files of their earlier versions call otherwise or lack."""

    class Versioned(nn.Linear):
        _version = 3

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
            versions.append(local_metadata.get('version'))
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    versions = []
    model = nn.Sequential(Versioned(1, 1))
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'x.pth')
    load_strict(model, str(tmp_path / 'x.pth'))
    assert set(versions) == {3}
    state = model.state_dict()
    state._metadata = 'of nobody'
    check_partial(model, {'state_dict': state}, 'x.pth')
    assert versions[-1] is None


def test_a_model_whose_own_loading_fails_says_so():
    class Failing(nn.Linear):
        def _load_from_state_dict(self, *args):
            raise ValueError('no pos_embed\nin this file')

    model = Failing(1, 1)
    with pytest.raises(
        CheckpointError, match=r'x\.pth cannot be loaded into Failing \(ValueError: no pos_embed in this file\)\.'
    ):
        check_partial(model, model.state_dict(), 'x.pth')


class Changing(Hook):
    """Keeps what it is told of, and changes a weight, as an EMAHook of low priority does, which is not ready before."""

    priority = 'VERY_LOW'
    is_ready = False
    told = None

    def before_run(self, runner):
        self.is_ready = True

    def after_load_checkpoint(self, runner, checkpoint):
        assert self.is_ready
        self.told = dict(checkpoint)
        checkpoint['state_dict']['0.bias'] = torch.arange(3.0)


@pytest.fixture
def evaluation(tmp_path, monkeypatch, caplog):
    """A runner, whose log is kept."""
    monkeypatch.setattr(runner, 'collect_env', dict)  # which asks compilers for their versions
    made = Runner(small_model(), str(tmp_path), custom_hooks=[Changing()], experiment_name=str(tmp_path))
    made.logger.addHandler(caplog.handler)
    yield made
    made.logger.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    ('averaged', 'is_kept'),
    [
        (None, True),
        ({}, True),
        (lambda state: {'steps': torch.tensor(5), **{f'module.{name}': state[name] for name in state}}, True),
        (lambda state: dict(state, steps=5), True),
        (lambda state: {f'module.{name}': state[name] for name in state if name != '0.bias'}, False),
        (lambda state: {f'module.{name}': state[name].flatten() for name in state}, False),
        (lambda state: {'module.0.bias': 'x'}, False),
        (lambda state: [1], False),
    ],
)
def test_hooks_are_told_of_trained_weights_once_they_are_ready(whole, evaluation, caplog, averaged, is_kept):
    path, state = whole
    content = {'state_dict': state, 'meta': {}}
    if averaged is not None:
        content['ema_state_dict'] = averaged(state) if callable(averaged) else averaged
    torch.save(content, path)
    (hook,) = (hook for hook in evaluation.hooks if isinstance(hook, Changing))
    load_trained_weights(evaluation, path)
    assert_same(evaluation.model.state_dict(), state)
    assert hook.told is None
    evaluation.call_hook('before_run')
    assert hook.told.keys() == content.keys() - ({'ema_state_dict'} if not is_kept else set())
    assert_same(evaluation.model.state_dict(), {**state, '0.bias': torch.arange(3.0)})
    said = f'{path} has an ema_state_dict of another form of the model, which is not used.'
    assert (said in caplog.messages) == (not is_kept)


def test_the_model_of_a_runner_is_found_in_what_wraps_it(evaluation):
    model = evaluation.model
    assert unwrap_model(evaluation) is model
    evaluation.model = nn.DataParallel(model)
    assert unwrap_model(evaluation) is model


def test_hooks_hear_nothing_of_weights_without_a_name(whole, evaluation):
    path, state = whole
    torch.save(state, path)
    (hook,) = (hook for hook in evaluation.hooks if isinstance(hook, Changing))
    load_trained_weights(evaluation, path)
    evaluation.call_hook('before_run')
    assert hook.told is None
    assert_same(evaluation.model.state_dict(), state)


def test_stock_mmengine_reads_a_converted_file(tmp_path):
    converted, _ = convert_checkpoint(read_checkpoint(authors_file(tmp_path / 'x.pth')))
    torch.save(converted, tmp_path / 'y.pth')
    backbone = EfficientViM('m1')
    backbone.load_state_dict(_load_checkpoint_with_prefix('backbone.', str(tmp_path / 'y.pth')), strict=True)
    expected = timm_state('efficientvim_m1', 1)
    assert_same(backbone.state_dict(), {k: expected[k] for k in backbone.state_dict()})


# Loading into a classifier's head


def head_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(('patch', 'stages'))}


def make_head(path: Path | None, num_classes: int = 1000, distilled: bool = False, **init_cfg) -> FusionClsHead:
    return FusionClsHead(
        num_classes,
        in_channels=(128, 192, 320, 320),
        distilled=distilled,
        init_cfg=path and dict(type='Pretrained', checkpoint=str(path), **init_cfg),
    )


@pytest.fixture
def log(caplog):
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize('dist', ['', '_dist'])
@pytest.mark.parametrize('layout', ['authors', 'timm', 'converted', 'prefix'])
def test_a_head_receives_every_tensor(tmp_path, layout, dist):
    name = f'efficientvim_m1{dist}'
    state = timm_state(name, 1)
    path = tmp_path / 'x.pth'
    if layout == 'authors':
        authors_file(path, name)
    elif layout == 'timm':
        save_file(state, path)
    else:
        converted = convert_checkpoint(state)[0]
        prefix = 'student.' if layout == 'prefix' else ''
        torch.save({'state_dict': {prefix + key: t for key, t in converted['state_dict'].items()}}, path)
    head = make_head(path, distilled=bool(dist), **(dict(prefix='student.head') if layout == 'prefix' else {}))
    head.init_weights()
    assert_same(head.state_dict(), head_of(state))


@pytest.mark.parametrize('how', ['Pretrained', 'mmengine.Pretrained', PretrainedInit])
def test_a_classifier_receives_backbone_and_head_from_one_file(tmp_path, how):
    path = authors_file(tmp_path / 'x.pth')
    init_cfg = dict(type=how, checkpoint=str(path))
    model = MODELS.build(
        dict(
            type='mmevm.DistillationClassifier',
            backbone=dict(
                type='mmevm.EfficientViM', arch='m1', out_indices=(2,), out_hidden_states=True, init_cfg=init_cfg
            ),
            head=dict(
                type='mmevm.FusionClsHead', num_classes=1000, in_channels=(128, 192, 320, 320), init_cfg=init_cfg
            ),
            data_preprocessor=dict(type='mmpretrain.ClsDataPreprocessor'),
            init_cfg=dict(type='TruncNormal', layer=['Conv2d', 'Linear'], std=0.02),
        )
    )
    model.init_weights()
    assert_same(model.state_dict(), convert_checkpoint(timm_state('efficientvim_m1', 1))[0]['state_dict'])


@pytest.mark.parametrize('dist', ['', '_dist'])
def test_a_head_of_other_classes_receives_all_but_its_classifiers(tmp_path, log, dist):
    name = f'efficientvim_m1{dist}'
    path = authors_file(tmp_path / 'x.pth', name)
    state = head_of(timm_state(name, 1))
    head = make_head(path, num_classes=200, distilled=bool(dist))
    head.init_weights()
    received = {key: tensor for key, tensor in state.items() if 'heads' not in key}
    assert set(received) == {key for key in head.state_dict() if 'heads' not in key}
    assert_same({key: head.state_dict()[key] for key in received}, received)
    for linear in [*head.heads, *(head.heads_dist if dist else ())]:
        assert torch.all(linear.bias == 0)
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)  # as without a checkpoint
    told = [line for line in log.messages if '1000' in line and '200' in line]
    assert told == [line for line in log.messages if 'random' in line]
    (line,) = told
    assert f'{path} knows 1000 classes, FusionClsHead 200: its {16 if dist else 8} tensors' in line
    assert 'heads.0.weight' in line


def test_a_head_of_as_many_classes_says_nothing_of_random_weights(tmp_path, log):
    make_head(authors_file(tmp_path / 'x.pth')).init_weights()
    assert any('17 of 17 tensors of FusionClsHead loaded' in line for line in log.messages)
    assert not any('random' in line for line in log.messages)


def head_error(path: Path, state: dict[str, torch.Tensor], **kwargs) -> str:
    torch.save(state, path)
    head = make_head(path, **kwargs)
    head.init_cfg = None
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_pretrained(head, str(path), prefix='head', class_dependent=r'heads(_dist)?\.')
    assert_same(head.state_dict(), before)
    with pytest.raises(CheckpointError, match=r'of the \d+ tensors of FusionClsHead'):
        make_head(path, **kwargs).init_weights()
    return str(error.value)


@pytest.mark.parametrize('name', ['weights', 'norm.3.bias', 'heads.0.bias', 'heads.2.weight'])
def test_a_head_that_does_not_receive_everything_is_an_error(tmp_path, name):
    state = {key: tensor for key, tensor in timm_state('efficientvim_m1').items() if key != name}
    message = head_error(tmp_path / 'x.pth', state)
    assert f"16 of the 17 tensors of FusionClsHead under the prefix 'head.': 1 missing ({name})" in message
    if not name.startswith('heads'):
        assert f'1 missing ({name})' in head_error(tmp_path / 'x.pth', state, num_classes=200)


def test_a_backbone_alone_or_another_arch_has_no_head_to_give(tmp_path):
    state = timm_state('efficientvim_m1')
    backbone = {key: tensor for key, tensor in state.items() if key not in head_of(state)}
    assert '0 of the 17' in head_error(tmp_path / 'x.pth', backbone)
    assert 'norm.1.weight: (192,) expected, (256,) in the file' in head_error(
        tmp_path / 'x.pth', timm_state('efficientvim_m2'), num_classes=200
    )


def test_between_distilled_heads_and_others(tmp_path, log):
    path = tmp_path / 'x.pth'
    message = head_error(path, timm_state('efficientvim_m1'), distilled=True)
    assert '17 of the 26 tensors' in message
    assert '9 missing (weights_dist, heads_dist.0.weight' in message

    state = timm_state('efficientvim_m1_dist')
    torch.save(state, path)
    head = make_head(path)
    log.clear()
    head.init_weights()
    assert_same(head.state_dict(), {k: t for k, t in head_of(state).items() if 'dist' not in k})
    beyond = len(state) - 17
    assert any(f'holds {beyond} tensors beyond FusionClsHead, not used' in line for line in log.messages)


# From elsewhere


@pytest.fixture
def server(tmp_path):
    """A local web server, as a stand-in for hosts that tests shall not need."""
    folder = tmp_path / 'served'
    folder.mkdir()
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def end_headers(self):
            self.send_header('X-Repo-Commit', '0123456789012345678901234567890123456789')
            self.send_header('ETag', '"0123456789"')
            if not Path(self.translate_path(self.path)).exists():
                self.send_header('X-Error-Code', 'EntryNotFound')
            super().end_headers()

        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield types.SimpleNamespace(url=f'http://127.0.0.1:{httpd.server_port}', folder=folder, requests=requests)
        httpd.shutdown()


def test_a_url_of_an_authors_file(server, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    authors_file(server.folder / 'm1.pth')
    expected = timm_state('efficientvim_m1', 1)
    backbone = EfficientViM('m1', init_cfg=dict(type='Pretrained', checkpoint=f'{server.url}/m1.pth'))
    backbone.init_weights()
    assert_same(backbone.state_dict(), {k: expected[k] for k in backbone.state_dict()})
    load_pretrained(backbone, f'{server.url}/m1.pth')  # from the cache
    assert server.requests == ['/m1.pth']
    with pytest.raises(CheckpointError, match=r'm2\.pth cannot be downloaded'):
        load_pretrained(backbone, f'{server.url}/m2.pth')


def test_a_url_whose_server_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with socket.socket() as unheard:
        unheard.bind(('127.0.0.1', 0))
        url = f'https://127.0.0.1:{unheard.getsockname()[1]}/m1.pth'
        with pytest.raises(CheckpointError, match=f'{url} cannot be downloaded'):
            load_pretrained(EfficientViM('m1'), url)


def test_urls_whose_files_have_the_same_name(server, tmp_path, monkeypatch):
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
    """A file backend of one's own, which has a local copy for as long as it is read."""

    @contextlib.contextmanager
    def get_local_path(self, uri):
        path = Path(uri.removeprefix('shelf://'))
        copy = path.with_suffix('.copy')
        shutil.copy(path, copy)
        yield copy
        copy.unlink()


register_backend('shelf', Shelf, force=True, prefixes='shelf')


def test_a_file_of_a_backend_of_mmengines(tmp_path):
    expected = timm_state('efficientvim_m1')
    torch.save(expected, tmp_path / 'x.pth')
    assert_same(fetch_checkpoint(f'shelf://{tmp_path}/x.pth'), expected)
    assert os.listdir(tmp_path) == ['x.pth']
    (tmp_path / 'y.pth').write_text('a page')
    for uri, problem in [
        (f'shelf://{tmp_path}/y.pth', ': .*y.copy is text'),
        (f'shelf://{tmp_path}/z.pth', r' cannot be had by a file backend of mmengine \(FileNotFoundError\): fetch it'),
        (f'drawer://{tmp_path}/x.pth', ' cannot be had by a file backend of mmengine'),
    ]:
        with pytest.raises(CheckpointError, match=f'^{uri}{problem}'):
            fetch_checkpoint(uri)


def test_tensors_are_fetched_to_the_device_that_is_asked_for(server, tmp_path, monkeypatch):
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
def test_one_process_of_a_node_downloads_and_none_waits_for_ever(server, tmp_path, exists):
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
    results = [process.communicate(timeout=120)[0].splitlines()[-1] for process in processes]
    expected = timm_state('efficientvim_m1', 1)
    total = sum(t.double().sum().item() for k, t in expected.items() if k.startswith(('patch', 'stages')))
    for result in results:
        if exists:
            assert float(result.removeprefix('sum:')) == pytest.approx(total)
        else:
            assert 'refused:' in result
            assert 'cannot be downloaded' in result
    assert server.requests == ['/m1.pth'] * (1 if exists else 2)


NAME = 'efficientvim_m1.e450_in1k'


def fill_hub_cache(hub: Path, repository: str = f'timm/{NAME}', seed: int = 0, revision: str = 'main') -> None:
    """As the hub lays it out: a reference from a branch to a commit, and the files of this commit."""
    commit = f'{seed:040}'
    repo = hub / f'models--{repository.replace("/", "--")}'
    (repo / 'refs').mkdir(parents=True, exist_ok=True)
    (repo / 'refs' / revision).write_text(commit)
    (repo / 'snapshots' / commit).mkdir(parents=True)
    save_file(timm_state('efficientvim_m1', seed), repo / 'snapshots' / commit / 'model.safetensors')


def test_timm_scheme_from_the_cache(tmp_path, monkeypatch):
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
def test_timm_scheme_takes_the_names_that_timm_takes(tmp_path, monkeypatch, name, seed):
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


def test_timm_scheme_names_the_repository_whose_weights_are_of_another_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    fill_hub_cache(tmp_path, 'me/other')
    (path,) = tmp_path.rglob('model.safetensors')
    save_file({'w': torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r'^timm://hf-hub:me/other: These are no weights of EfficientViM'):
        fetch_checkpoint('timm://hf-hub:me/other')


def test_timm_scheme_offline_says_the_two_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(CheckpointError, match=r'model\.safetensors.*backbone\.init_cfg=None') as error:
        load_pretrained(EfficientViM('m1'), f'timm://{NAME}')
    assert f'timm/{NAME}' in str(error.value)
    assert error.value.__cause__ is not None
    with pytest.raises(CheckpointError, match=r'^timm://hf-hub:a/b/c is not in the cache .* \(HFValidationError\)'):
        fetch_checkpoint('timm://hf-hub:a/b/c')


def test_timm_scheme_lists_the_names_there_are():
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
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=100)
    said = dict(line.split(' ', 1) for line in done.stdout.splitlines() if line.startswith(tuple(names)))
    for name, seed in zip(names, [0, 1, 3], strict=False):
        assert float(said[name]) == pytest.approx(timm_state('efficientvim_m1', seed)['weights'].sum().item())
    assert re.match(r'timm://hf-hub:me/none is not in the cache .* its download failed \(\w+Error\)\.', said[names[-1]])


# The tool


def run_tool(*args: str | Path, **env: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', **env}
    command = [sys.executable, ROOT / 'tools' / 'convert_checkpoint.py', *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_tool_downloads_and_converts(server, tmp_path):
    repo = server.folder / 'timm' / NAME / 'resolve' / 'main'
    repo.mkdir(parents=True)
    save_file(timm_state('efficientvim_m1'), repo / 'model.safetensors')
    target = tmp_path / 'new' / 'm1.pth'
    done = run_tool(f'timm://{NAME}', target, HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / 'hf'), HF_HUB_OFFLINE='0')
    assert done.returncode == 0, done.stderr
    assert 'EfficientViM-M1' in done.stdout
    written = torch.load(target, weights_only=True)
    assert_same(written['state_dict'], convert_checkpoint(timm_state('efficientvim_m1'))[0]['state_dict'])
    assert written['meta']['source'] == "a classifier in timm's layout"
    assert os.listdir(target.parent) == ['m1.pth']


def test_tool_refuses_in_one_sentence(tmp_path):
    target = tmp_path / 'old.pth'
    target.write_text('what was there')
    state = timm_state('efficientvim_m1')
    torch.save({**state, 'surprise': torch.ones(1)}, tmp_path / 'x.pth')
    done = run_tool(tmp_path / 'x.pth', target)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith('CheckpointError: ')
    assert 'surprise' in done.stderr
    assert 'Traceback' not in done.stderr
    assert target.read_text() == 'what was there'
    assert sorted(os.listdir(tmp_path)) == ['old.pth', 'x.pth']


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location('convert_checkpoint', ROOT / 'tools' / 'convert_checkpoint.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(('weights', 'seed'), [([], 1), (['--weights', 'ema'], 1), (['--weights', 'model'], 0)])
def test_tool_chooses_weights_and_accounts_for_everything(tool, tmp_path, monkeypatch, capsys, weights, seed):
    source = authors_file(tmp_path / 'x.pth')
    monkeypatch.setattr(sys, 'argv', ['convert_checkpoint.py', str(source), str(tmp_path / 'y.pth'), *weights])
    tool.main()
    state = timm_state('efficientvim_m1', seed)
    assert_same(
        torch.load(tmp_path / 'y.pth', weights_only=True)['state_dict'], convert_checkpoint(state)[0]['state_dict']
    )
    printed = capsys.readouterr().out
    assert f'loaded: {len(state)} tensors' in printed
    assert 'patch_embed.* -> backbone.patch_embed.* (24)' in printed
    assert 'heads.* -> head.heads.* (8)' in printed
    for entry in ('optimizer', 'config', 'args', 'epoch'):
        assert f'\n  {entry}: ' in printed


def test_tool_leaves_nothing_behind_when_the_disk_is_full(tool, tmp_path, monkeypatch):
    source = authors_file(tmp_path / 'x.pth')
    monkeypatch.setattr(sys, 'argv', ['convert_checkpoint.py', str(source), str(tmp_path / 'full' / 'y.pth')])
    (tmp_path / 'full').write_text('a file where a folder is needed')
    with pytest.raises(OSError, match=r'File exists|Not a directory'):
        tool.main()
    shutil.copy(source, tmp_path / 'full')  # still what it was: a file


# What reading must not do, and where it puts what it reads


@pytest.mark.parametrize('zipped', [True, False])
def test_tensors_go_to_the_device_that_is_asked_for(tmp_path, zipped):
    path = tmp_path / 'x.pth'
    torch.save({'w': torch.ones(2)}, path, _use_new_zipfile_serialization=zipped)
    assert read_checkpoint(path)['w'].device.type == 'cpu'
    assert read_checkpoint(path, 'meta')['w'].device.type == 'meta'


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('zipped', [True, False])
def test_of_the_module_torch_only_types_are_given(tmp_path, zipped):
    path = tmp_path / 'x.pth'
    content = {'w': torch.ones(1), 'dtype': torch.half, 'evil': Call(torch.set_default_dtype, torch.double)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    before = torch.get_default_dtype()
    try:
        read = read_checkpoint(path)
        assert torch.get_default_dtype() == before
    finally:
        torch.set_default_dtype(before)
    assert read['dtype'] is torch.half
    assert torch.equal(read['w'], torch.ones(1))
