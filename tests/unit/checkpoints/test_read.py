"""Read files of torch.save and safetensors without running code from them."""

import argparse
import builtins
import contextlib
import functools
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from checkpoint_formats import assert_same, authors_file, authors_layout, timm_state
from malicious import Call
from safetensors.torch import save_file
from torch import nn

from mmevm.checkpoints import (
    CheckpointError,
    convert_checkpoint,
    read_checkpoint,
)


@pytest.mark.parametrize('zipped', [True, False])
def test_read_builds_tensors_and_containers_only(tmp_path, zipped):
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
def test_read_equals_torch_load(tmp_path, zipped):
    attributed = torch.arange(3.0)
    attributed.note = 'an attribute'
    parameter = nn.Parameter(torch.ones(2))
    parameter.note = 'an attribute'
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
def test_malicious_pickle_runs_no_code(tmp_path, gadget, zipped):
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
def test_pickle_cannot_change_the_functions_it_calls(tmp_path, name):
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
def test_pickle_cannot_call_functions_of_torch(tmp_path, zipped):
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


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('zipped', [True, False])
def test_pickled_module_is_refused(tmp_path, zipped):
    path = tmp_path / 'x.pth'
    torch.save(nn.Linear(1, 1), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r'holds a torch\.nn\.modules\.linear\.Linear'):
        convert_checkpoint(read_checkpoint(path))


@pytest.mark.filterwarnings('ignore')
def test_torchscript_program_is_refused(tmp_path):
    path = tmp_path / 'x.pt'
    torch.jit.script(nn.Linear(1, 1)).save(str(path))
    with pytest.raises(CheckpointError, match='TorchScript program'):
        read_checkpoint(path)


def test_files_without_weights_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r'no checkpoint .*missing\.pth'):
        read_checkpoint(tmp_path / 'missing.pth')
    with pytest.raises(CheckpointError, match='is a directory'):
        read_checkpoint(tmp_path)
    for content, message in {
        b'': 'is empty',
        b'<!DOCTYPE html><html><body>Not found</body></html>': 'web page instead',
        b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n': 'is text',
        b'\x89PNG\r\n\x1a\n' + bytes(100): 'of unknown format',
        pickle.dumps({'w': 1}): 'a pickle that torch.save did not write',
    }.items():
        path = tmp_path / 'x.pth'
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message) as error:
            read_checkpoint(path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize('layout', ['zip', 'legacy', 'safetensors'])
def test_truncated_file_is_refused(tmp_path, layout):
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
def test_read_files_without_checksums(tmp_path):
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


FORGERIES = {
    # A number of elements in the pickle: 256 (BININT2) becomes 10^13 (LONG1).
    'storage': (b'M\x00\x01', b'\x8a\x06' + HUGE.to_bytes(6, 'little')),
    'header': (b'[256],"data_offsets":[0,1024]', b'[%d],"data_offsets":[0,%d]' % (HUGE, 4 * HUGE)),
    'shape': (b'[256]', b'[%d]' % HUGE),
}


def save_forgery(path: Path, layout: str) -> None:
    """Save a file of a kilobyte whose tensor has 10^13 elements."""
    kind, _, forgery = layout.partition(', ')
    if forgery in ('expanded', 'strided'):
        stored = torch.ones(256)
        huge = stored[:1].expand(HUGE) if forgery == 'expanded' else stored.as_strided((1, 10**7, 10**6), (256, 0, 0))
        torch.save({'w': huge}, path, _use_new_zipfile_serialization=kind == 'zip')
    elif kind == 'safetensors':
        save_file({'w': torch.ones(256)}, path)
        data = path.read_bytes()
        (size,) = struct.unpack('<Q', data[:8])
        header = data[8 : 8 + size].replace(*FORGERIES[forgery])
        path.write_bytes(struct.pack('<Q', len(header)) + header + data[8 + size :])
    elif kind == 'legacy':
        torch.save({'w': torch.ones(256)}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes().replace(*FORGERIES[forgery]))
    else:
        torch.save({'w': torch.ones(256)}, path)
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, 'w') as archive:
            for name, data in records.items():
                archive.writestr(name, data.replace(*FORGERIES[forgery]) if name.endswith('data.pkl') else data)


@pytest.mark.skipif(sys.platform != 'linux', reason='limits the address space')
@pytest.mark.parametrize(
    'layout',
    [
        *('zip, storage', 'zip, expanded', 'zip, strided'),
        *('legacy, storage', 'legacy, expanded', 'legacy, strided'),
        *('safetensors, header', 'safetensors, shape'),
    ],
)
def test_small_file_with_a_huge_tensor_is_refused_without_allocation(tmp_path, layout):
    import resource

    path = tmp_path / 'x.pth'
    save_forgery(path, layout)
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
def test_read_expanded_tensors(tmp_path, zipped):
    path = tmp_path / 'x.pth'
    expected = {'row': torch.arange(5.0).expand(1000, 5), 'one': torch.ones(1, dtype=torch.bool).expand(3, 4)}
    torch.save(expected, path, _use_new_zipfile_serialization=zipped)
    assert_same(read_checkpoint(path), expected)


@pytest.mark.parametrize('zipped', [True, False])
def test_read_to_a_device(tmp_path, zipped):
    path = tmp_path / 'x.pth'
    torch.save({'w': torch.ones(2)}, path, _use_new_zipfile_serialization=zipped)
    assert read_checkpoint(path)['w'].device.type == 'cpu'
    assert read_checkpoint(path, 'meta')['w'].device.type == 'meta'
