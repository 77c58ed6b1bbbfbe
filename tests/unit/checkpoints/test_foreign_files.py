"""Files given by mistake: they are refused in one sentence, or their tensors are read as they were saved."""

import functools
import os
import pickle
import re
import struct

import cv2
import numpy as np
import pytest
import torch
from foreign_files import PLACES, assert_arrived, half, other_arch, safetensors, saved, sentence
from mmengine.config import Config
from mmengine.registry import MODELS
from safetensors.torch import load_file
from torch import nn

from mmevm.checkpoints import read_checkpoint
from mmevm.engine.training_state import check_training_checkpoint

pytestmark = pytest.mark.filterwarnings('ignore')


def cut(where):
    def make(content, path):
        data = saved(content, path).read_bytes()
        path.write_bytes(data[: where(len(data))])

    return make


def flipped(content, path):
    """Flip one bit of a weight."""
    data = bytearray(saved(content, path).read_bytes())
    weight = content['state_dict']['backbone.patch_embed.conv.0.conv.weight'].numpy().tobytes()
    data[data.index(weight) + 7] ^= 1
    path.write_bytes(data)


def as_bytes(data):
    return lambda content, path: path.write_bytes(data)


def short_safetensors(content, path):
    path.write_bytes(safetensors(content, path).read_bytes()[:-5])


def forged_safetensors(content, path):
    """Change the header so that a tensor is beyond the end of the file."""
    data = safetensors(content, path).read_bytes()
    (size,) = struct.unpack('<Q', data[:8])
    header = data[8 : 8 + size].replace(b'"data_offsets":[0,', b'"data_offsets":[9,')
    path.write_bytes(struct.pack('<Q', 2**40) + header + data[8 + size :])


def huge(content, path):
    """Save a tensor of 10^13 elements, of which four bytes are stored."""
    name = 'backbone.patch_embed.conv.0.conv.weight'
    saved({**content, 'state_dict': {**content['state_dict'], name: torch.ones(1).expand(10**13)}}, path)


def npz(content, path):
    with path.open('wb') as file:
        np.savez(file, **{name: tensor.numpy() for name, tensor in content['state_dict'].items()})


def program(content, path):
    torch.jit.script(nn.Linear(1, 1)).save(str(path))


BYTES = {
    'empty': (as_bytes(b''), 'is empty'),
    'truncated in its header': (cut(lambda size: 20), 'cut off or damaged'),
    'truncated in its middle': (cut(lambda size: size // 2), 'cut off or damaged'),
    'truncated at its end': (cut(lambda size: size - 3), 'cut off or damaged'),
    'one bit flipped': (flipped, 'cut off or damaged .* checksum of .* is wrong'),
    'text': (as_bytes(b'epoch 1: loss 0.3\n'), 'is text'),
    'page': (as_bytes(b'<!DOCTYPE html><html><body>Not found</body></html>'), 'web page'),
    'picture': (as_bytes(b'\x89PNG\r\n\x1a\n' + bytes(100)), 'of unknown format'),
    'directory': (lambda content, path: path.mkdir(), 'is a directory'),
    'missing': (lambda content, path: None, 'There is no checkpoint'),
    'plain pickle': (as_bytes(pickle.dumps({'w': 1})), 'a pickle that torch.save did not write'),
    'npz': (npz, 'a zip archive of .* files that torch.save did not write'),
    'TorchScript': (program, 'a TorchScript program'),
    'huge tensor': (huge, 'cut off or damaged .* needs 40000000000000 bytes, but the file stores 4'),
    'safetensors, truncated': (short_safetensors, 'cut off or damaged|holds weights only'),
    'safetensors, forged header': (forged_safetensors, 'cut off or damaged|holds weights only'),
}


@pytest.mark.parametrize('name', PLACES)
@pytest.mark.parametrize('file', BYTES)
def test_files_that_are_not_checkpoints_are_refused(place, content, name, file, tmp_path):
    make, message = BYTES[file]
    path = tmp_path / 'given.pth'
    make(content, path)
    assert re.search(message, sentence(getattr(place, name), path))


@pytest.fixture
def nobody():
    """Switch to an unprivileged user, because root reads every file."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


@pytest.mark.skipif(os.name == 'nt', reason='Windows has other permissions')
@pytest.mark.parametrize('read', [read_checkpoint, check_training_checkpoint])
def test_file_without_read_permission_is_refused(tmp_path, read, request):
    path = saved({'w': torch.ones(1)}, tmp_path / 'given.pth')
    path.chmod(0)
    request.getfixturevalue('nobody')
    assert 'cannot be opened: Permission denied' in sentence(read, path)


def with_state(change):
    def make(content, path):
        saved(content | {'state_dict': change(dict(content['state_dict']))}, path)

    return make


def cast(dtype):
    return with_state(lambda state: {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()})


def replaced(tensor):
    """Replace the weight of the first convolution."""

    def change(state):
        name = 'backbone.patch_embed.conv.0.conv.weight'
        return state | {name: tensor(state[name]) if callable(tensor) else tensor}

    return with_state(change)


def poisoned(value):
    def change(weight):
        weight = weight.clone()
        weight[0, 0, 0, 0] = value
        return weight

    return replaced(change)


LOADS = None


MISFIT = 'missing|another shape|not a complete'


CONTENTS = {
    'as it is': (saved, LOADS),
    'legacy format': (functools.partial(saved, _use_new_zipfile_serialization=False), LOADS),
    'bare state dict': (lambda content, path: saved(content['state_dict'], path), LOADS),
    'safetensors': (safetensors, LOADS),
    'float16': (cast(torch.float16), LOADS),
    'bfloat16': (cast(torch.bfloat16), LOADS),
    'float64': (cast(torch.float64), LOADS),
    'of DistributedDataParallel': (with_state(lambda state: {f'module.{k}': v for k, v in state.items()}), LOADS),
    'parameters': (
        with_state(lambda state: {k: nn.Parameter(v, v.is_floating_point()) for k, v in state.items()}),
        LOADS,
    ),
    'not contiguous': (replaced(lambda weight: weight.transpose(2, 3).contiguous().transpose(2, 3)), LOADS),
    'integers': (cast(torch.int8), 'torch.int8 .*, but floating-point numbers are expected'),
    'NaN': (poisoned(float('nan')), r'NaN or infinite values \((backbone\.)?patch_embed'),
    'infinite': (poisoned(float('-inf')), r'NaN or infinite values \((backbone\.)?patch_embed'),
    'other arch': (with_state(other_arch), dict(convert=LOADS, pretrained=MISFIT, test=MISFIT)),
    'other shape': (replaced(torch.ones(16, 3, 5, 5)), r'\(16, 3, 5, 5\) in the file|\(2, 3, 3, 3\) expected'),
    '0-dim': (replaced(torch.ones(())), r'another shape .*patch_embed.*\(\) in the file'),
    'all 0-dim': (with_state(lambda state: {k: torch.ones((), dtype=v.dtype) for k, v in state.items()}), MISFIT),
    'half of the keys': (with_state(half), r'\d+ missing'),
    'not a tensor': (replaced('no tensor'), r'1 missing \((backbone\.)?patch_embed\.conv\.0\.conv\.weight'),
    'sparse': (
        replaced(lambda weight: weight.to_sparse()),
        r'1 missing \((backbone\.)?patch_embed\.conv\.0\.conv\.weight',
    ),
    'other network': (
        lambda content, path: saved(nn.Linear(2, 2).state_dict(), path),
        'an EfficientViM has|missing',
    ),
    'list': (lambda content, path: saved(list(content['state_dict'].values()), path), 'holds a list'),
    'tensor': (lambda content, path: saved(torch.ones(3), path), 'holds a Tensor'),
    'empty dict': (lambda content, path: saved({}, path), 'no tensors'),
    'numbered': (lambda content, path: saved(dict(enumerate(content['state_dict'].values())), path), 'no tensors'),
    'more keys': (
        with_state(lambda state: state | {'surprise.weight': torch.ones(1)}),
        dict(
            convert=r'1 unknown .surprise\.weight', pretrained=LOADS, test=r'1 unknown to the model .surprise\.weight'
        ),
    ),
    'pickled module': (lambda content, path: saved(nn.Linear(2, 2), path), 'holds a torch.nn.modules.linear.Linear'),
}


def scores(config, state):
    """Return the scores of the evaluation images, computed by the model directly."""
    cfg = Config.fromfile(config)
    model = MODELS.build(dict(cfg.model, _scope_='mmpretrain')).eval()
    model.load_state_dict(state)
    paths = sorted((config.parent / 'val').glob('*/*.png'))
    images = torch.from_numpy(np.stack([cv2.imread(str(path))[..., ::-1] for path in paths])).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(cfg.data_preprocessor[key]).reshape(3, 1, 1) for key in ('mean', 'std'))
    with torch.no_grad():
        return model.head(model.extract_feat((images - mean) / std)).softmax(1)


@pytest.mark.parametrize('name', PLACES[:3])
@pytest.mark.parametrize('file', [*CONTENTS, 'wrong suffix'])
def test_contents_are_loaded_or_refused(place, content, name, file, tmp_path, config):
    make, message = CONTENTS.get(file, (saved, LOADS))
    path = tmp_path / ('given.jpg' if file == 'wrong suffix' else 'given.pth')
    make(content, path)
    message = message[name] if isinstance(message, dict) else message
    if message:
        assert re.search(message, sentence(getattr(place, name), path))
        return
    # read by torch or safetensors
    given = load_file(path) if file == 'safetensors' else torch.load(path, weights_only=True)
    given = given.get('state_dict', given)
    given = {key.removeprefix('module.'): tensor.detach() for key, tensor in given.items()}
    arrived = getattr(place, name)(path)
    if name == 'test':
        torch.testing.assert_close(arrived, scores(config, given), atol=1e-5, rtol=0)
    else:
        assert_arrived(arrived, {key: given[key] for key in arrived})
