"""Files that a person may give to the tools by mistake, or that were made to do harm, at each place that takes files.

A file is refused in one sentence that names it, or its tensors arrive as they were saved.
"""

import functools
import os
import pickle
import re
import struct
import zipfile

import cv2
import numpy as np
import pytest
import torch
from command_line import ROOT, run_here
from malicious import Call
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS
from mmengine.runner import runner
from randomize import randomize
from safetensors.torch import load_file, save_file
from torch import nn

from mmevm.checkpoints import CheckpointError, read_checkpoint
from mmevm.engine.training_state import check_training_checkpoint, training_globals
from mmevm.models import EfficientViM

ARCH = dict(embed_dims=(16, 24), depths=(1, 1), state_dims=(4, 4))
# Small, with a hook that keeps a second set of weights, schedulers whose states hold objects, and a rate of 0: the
# weights stay what they are.
CONFIG = f"""
_base_ = '{ROOT}/configs/demo/efficientvim-m1_digits.py'
model = dict(
    backbone=dict(arch=dict(_delete_=True, **{ARCH!r}), out_indices=(1,)),
    head=dict(num_classes=2, in_channels=[16, 24, 24]),
    train_cfg=None,
)
data_preprocessor = dict(num_classes=2)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(optimizer=dict(lr=0.0))
param_scheduler = [
    dict(type='MultiStepLR', milestones=[5]),
    dict(type='OneCycleLR', eta_max=0.0, total_steps=9),
]
custom_hooks = [dict(type='EMAHook')]
default_hooks = dict(checkpoint=dict(interval=1, save_best='accuracy/top1'), logger=dict(interval=1))
train_cfg = dict(max_epochs=1, val_interval=1)
randomness = dict(seed=0)
"""

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """A config of a small classifier, and two images of each of its two classes."""
    root = tmp_path_factory.mktemp('data')
    generator = np.random.default_rng(0)
    for split in ('train', 'val'):
        for name in ('a', 'b'):
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                cv2.imwrite(str(root / split / name / f'{i}.png'), generator.integers(0, 256, (64, 64, 3), np.uint8))
    path = root / 'tiny.py'
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope='module')
def state(config):
    """Of the small classifier, with random weights in all places."""
    model = Config.fromfile(config).model
    return randomize(MODELS.build(dict(model, _scope_='mmpretrain'))).state_dict()


@pytest.fixture(scope='module')
def whole_state():
    """Of a backbone that convert_checkpoint knows."""
    return {f'backbone.{name}': tensor for name, tensor in randomize(EfficientViM('m1')).state_dict().items()}


@pytest.fixture(scope='module')
def trained(config, tmp_path_factory):
    """What an epoch of training leaves."""
    work_dir = tmp_path_factory.mktemp('trained')
    with pytest.MonkeyPatch.context() as monkeypatch:
        options = ['--work-dir', work_dir, '--data-root', config.parent]
        run_here(monkeypatch, ROOT / 'tools/train.py', config, *options)
    return torch.load(work_dir / 'epoch_1.pth', weights_only=False)


@pytest.fixture(autouse=True)
def unchanged_safe_globals():
    """Forget the classes that resuming a training admits for the whole process."""
    if not hasattr(torch.serialization, 'get_safe_globals'):  # torch 2.3
        yield
        return
    before = torch.serialization.get_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


# A runner asks compilers for their versions, each time anew.
ENVIRONMENT = functools.cache(runner.collect_env)

# The places that take a file. Each gives what has arrived of it, or fails with a sentence.


class Place:
    def __init__(self, config, monkeypatch, folder):
        self.config = config
        self.folder = folder
        self.run = functools.partial(run_here, monkeypatch)

    def convert(self, path):
        self.run(ROOT / 'tools/convert_checkpoint.py', path, self.folder / 'converted.pth')
        return torch.load(self.folder / 'converted.pth', weights_only=True)['state_dict']

    def pretrained(self, path):
        backbone = EfficientViM(ARCH, out_indices=(1,), init_cfg=dict(type='Pretrained', checkpoint=str(path)))
        backbone.init_weights()
        return {f'backbone.{name}': tensor for name, tensor in backbone.state_dict().items()}

    def test(self, path):
        options = ['--work-dir', self.folder / 'work', '--data-root', self.config.parent]
        self.run(ROOT / 'tools/test.py', self.config, path, *options, '--out', self.folder / 'out.pkl')
        return torch.stack([one['pred_score'] for one in pickle.loads((self.folder / 'out.pkl').read_bytes())])

    def start(self, path, options=()):
        paths = ['--work-dir', self.folder / 'work', '--data-root', self.config.parent]
        self.run(ROOT / 'tools/train.py', self.config, *paths, '--cfg-options', f'load_from={path}', *options)
        last = (self.folder / 'work/last_checkpoint').read_text()
        return torch.load(last, weights_only=False)['state_dict']

    def resume(self, path):
        options = ['--work-dir', self.folder / 'work', '--data-root', self.config.parent, '--resume', path]
        self.run(ROOT / 'tools/train.py', self.config, *options, '--cfg-options', 'train_cfg.max_epochs=2')
        return torch.load(self.folder / 'work/epoch_2.pth', weights_only=False)['state_dict']


@pytest.fixture
def place(config, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, 'collect_env', ENVIRONMENT)
    return Place(config, monkeypatch, tmp_path)


def sentence(run, path):
    """What is said of a file that is refused."""
    with pytest.raises((SystemExit, CheckpointError)) as error:
        run(path)
    if error.type is SystemExit:
        assert isinstance(error.value.code, str)  # printed, with exit code 1
        said = error.value.code.removeprefix('CheckpointError: ')
        assert said != error.value.code
    else:
        said = str(error.value)
    assert str(path) in said
    assert said.endswith('.')
    assert '\n' not in said
    return said


@pytest.fixture
def content(request, name):
    """What is saved at a place if nobody makes a mistake."""
    fixture = dict(convert='whole_state', resume='trained').get(name, 'state')
    value = request.getfixturevalue(fixture)
    return value if name == 'resume' else {'state_dict': value, 'meta': {}}


# Bytes


def saved(content, path, **options):
    torch.save(content, path, **options)
    return path


def cut(where):
    def make(content, path):
        data = saved(content, path).read_bytes()
        path.write_bytes(data[: where(len(data))])

    return make


def flipped(content, path):
    """One bit of a weight is another."""
    data = bytearray(saved(content, path).read_bytes())
    weight = content['state_dict']['backbone.patch_embed.conv.0.conv.weight'].numpy().tobytes()
    data[data.index(weight) + 7] ^= 1
    path.write_bytes(data)


def as_bytes(data):
    return lambda content, path: path.write_bytes(data)


def safetensors(content, path):
    save_file({name: tensor.contiguous() for name, tensor in content['state_dict'].items()}, path)
    return path


def short_safetensors(content, path):
    path.write_bytes(safetensors(content, path).read_bytes()[:-5])


def lying_safetensors(content, path):
    """The header says that a tensor is beyond the file's end."""
    data = safetensors(content, path).read_bytes()
    (size,) = struct.unpack('<Q', data[:8])
    header = data[8 : 8 + size].replace(b'"data_offsets":[0,', b'"data_offsets":[9,')
    path.write_bytes(struct.pack('<Q', 2**40) + header + data[8 + size :])


def huge(content, path):
    """A tensor of 10^13 elements, of which four bytes are stored."""
    name = 'backbone.patch_embed.conv.0.conv.weight'
    saved({**content, 'state_dict': {**content['state_dict'], name: torch.ones(1).expand(10**13)}}, path)


def npz(content, path):
    with path.open('wb') as file:
        np.savez(file, **{name: tensor.numpy() for name, tensor in content['state_dict'].items()})


def program(content, path):
    torch.jit.script(nn.Linear(1, 1)).save(str(path))


BYTES = {
    'empty': (as_bytes(b''), 'is empty'),
    'cut in its header': (cut(lambda size: 20), 'cut off or damaged'),
    'cut in its middle': (cut(lambda size: size // 2), 'cut off or damaged'),
    'cut at its end': (cut(lambda size: size - 3), 'cut off or damaged'),
    'one bit flipped': (flipped, 'cut off or damaged .* those that were written'),
    'text': (as_bytes(b'epoch 1: loss 0.3\n'), 'is text'),
    'page': (as_bytes(b'<!DOCTYPE html><html><body>Not found</body></html>'), 'web page'),
    'picture': (as_bytes(b'\x89PNG\r\n\x1a\n' + bytes(100)), 'no known format'),
    'directory': (lambda content, path: path.mkdir(), 'is a directory'),
    'missing': (lambda content, path: None, 'There is no checkpoint'),
    'plain pickle': (as_bytes(pickle.dumps({'w': 1})), 'a pickle that torch.save has not written'),
    'npz': (npz, 'a zip archive that torch.save has not written'),
    'TorchScript': (program, 'a TorchScript program'),
    'huge tensor': (huge, 'cut off or damaged .* needs 40000000000000 bytes, but the file stores 4'),
    'safetensors, cut': (short_safetensors, 'cut off or damaged|holds weights only'),
    'safetensors, header lies': (lying_safetensors, 'cut off or damaged|holds weights only'),
}


@pytest.mark.parametrize('name', ['convert', 'pretrained', 'test', 'resume', 'start'])
@pytest.mark.parametrize('file', BYTES)
def test_bytes_that_are_no_checkpoint(place, content, name, file, tmp_path):
    make, message = BYTES[file]
    path = tmp_path / 'given.pth'
    make(content, path)
    assert re.search(message, sentence(getattr(place, name), path))


@pytest.fixture
def nobody():
    """root reads every file."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


@pytest.mark.skipif(os.name == 'nt', reason='Windows has other permissions')
@pytest.mark.parametrize('read', [read_checkpoint, check_training_checkpoint])
def test_a_file_that_may_not_be_read(tmp_path, read, request):
    path = saved({'w': torch.ones(1)}, tmp_path / 'given.pth')
    path.chmod(0)
    request.getfixturevalue('nobody')
    assert 'cannot be opened: Permission denied' in sentence(read, path)


# Contents


def with_state(change):
    def make(content, path):
        saved(content | {'state_dict': change(dict(content['state_dict']))}, path)

    return make


def cast(dtype):
    return with_state(lambda state: {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()})


def replaced(tensor):
    """The first convolution's weight is another."""

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


def half(state):
    return {name: state[name] for i, name in enumerate(state) if i % 2}


def other_arch(state):
    other = EfficientViM('m2').state_dict()
    return {f'backbone.{name}': tensor for name, tensor in other.items()}


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
    'whole numbers': (cast(torch.int8), 'torch.int8, where floating-point numbers are needed'),
    'NaN': (poisoned(float('nan')), r'NaN or infinite numbers \((backbone\.)?patch_embed'),
    'infinite': (poisoned(float('-inf')), r'NaN or infinite numbers \((backbone\.)?patch_embed'),
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
    'other network': (lambda content, path: saved(nn.Linear(2, 2).state_dict(), path), 'no weights of|missing'),
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
    'whole module': (lambda content, path: saved(nn.Linear(2, 2), path), 'holds a torch.nn.modules.linear.Linear'),
}


def assert_arrived(arrived, expected):
    """All numbers are those that were saved, in whatever precision."""
    assert expected.keys() == arrived.keys()
    for name, tensor in expected.items():
        assert torch.equal(arrived[name].double(), tensor.double()), name


def scores(config, state):
    """Of the images in the order in which they are evaluated, by the model itself."""
    cfg = Config.fromfile(config)
    model = MODELS.build(dict(cfg.model, _scope_='mmpretrain')).eval()
    model.load_state_dict(state)
    paths = sorted((config.parent / 'val').glob('*/*.png'))
    images = torch.from_numpy(np.stack([cv2.imread(str(path))[..., ::-1] for path in paths])).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(cfg.data_preprocessor[key]).reshape(3, 1, 1) for key in ('mean', 'std'))
    with torch.no_grad():
        return model.head(model.extract_feat((images - mean) / std)).softmax(1)


@pytest.mark.parametrize('name', ['convert', 'pretrained', 'test'])
@pytest.mark.parametrize('file', [*CONTENTS, 'wrong suffix'])
def test_contents(place, content, name, file, tmp_path, config):
    make, message = CONTENTS.get(file, (saved, LOADS))
    path = tmp_path / ('given.jpg' if file == 'wrong suffix' else 'given.pth')
    make(content, path)
    message = message[name] if isinstance(message, dict) else message
    if message:
        assert re.search(message, sentence(getattr(place, name), path))
        return
    # What was saved, by torch or safetensors alone.
    given = load_file(path) if file == 'safetensors' else torch.load(path, weights_only=True)
    given = given.get('state_dict', given)
    given = {key.removeprefix('module.'): tensor.detach() for key, tensor in given.items()}
    arrived = getattr(place, name)(path)
    if name == 'test':
        torch.testing.assert_close(arrived, scores(config, given), atol=1e-5, rtol=0)
    else:
        assert_arrived(arrived, {key: given[key] for key in arrived})


# What a training goes on from


def without(*keys):
    return lambda content: {key: value for key, value in content.items() if key not in keys}


def within(entry, **values):
    return lambda content: content | {entry: content[entry] | values}


def remembered(**values):
    return lambda content: within('message_hub', runtime_info=content['message_hub']['runtime_info'] | values)(content)


class Own:
    """A class of somebody's own, harmless."""


TRAININGS = {
    'weights and meta': (without('optimizer', 'message_hub', 'param_schedulers'), 'holds weights only'),
    'no message hub': (without('message_hub'), 'holds weights only.*message_hub'),
    'no meta': (without('meta'), 'holds weights only.*meta'),
    'bare state dict': (lambda content: content['state_dict'], 'holds weights only'),
    'list': (list, 'holds a list'),
    'epoch that is no number': (within('meta', epoch='2'), 'after which epoch'),
    'negative iteration': (within('meta', iter=-1), 'after which epoch'),
    'other message hub': (lambda content: content | {'message_hub': {'log': {}}}, 'not mmengine'),
    'a file to remove': (remembered(best_ckpt='/home/somebody'), "'/home/somebody' as its best_ckpt"),
    'steps to remove': (remembered(keep_ckpt_ids=['/../../somebody']), 'somebody.* as its keep_ckpt_ids'),
    'half of the keys': (lambda content: content | {'state_dict': half(content['state_dict'])}, r'\d+ missing'),
    'other arch': (lambda content: content | {'state_dict': other_arch(content['state_dict'])}, 'another shape'),
    'object of another class': (within('meta', own=Own()), r'names test_foreign_files\.Own'),
    'NaN': (
        lambda content: content | {'state_dict': {k: v * torch.nan for k, v in content['state_dict'].items()}},
        'NaN or infinite numbers',
    ),
}


@pytest.mark.parametrize('file', TRAININGS)
def test_a_training_cannot_go_on_from_this(place, trained, file, tmp_path):
    change, message = TRAININGS[file]
    path = saved(change(trained), tmp_path / 'given.pth')
    assert re.search(message, sentence(place.resume, path))


def test_a_training_whose_log_is_cut_off_within_a_whole_archive(trained, tmp_path):
    whole, path = saved(trained, tmp_path / 'whole.pth'), tmp_path / 'cut.pth'
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, 'w') as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, data[: len(data) // 2] if name.endswith('data.pkl') else data)
    with pytest.raises(CheckpointError, match=rf'{path} is cut off or damaged and cannot be read'):
        check_training_checkpoint(path)


@pytest.mark.parametrize('layout', ['legacy', 'safetensors'])
def test_a_training_is_in_torchs_format(place, trained, layout, tmp_path):
    path = tmp_path / 'given.pth'
    if layout == 'legacy':
        saved(trained, path, _use_new_zipfile_serialization=False)
    else:
        safetensors(trained, path)
    assert re.search('old format' if layout == 'legacy' else 'holds weights only', sentence(place.resume, path))


def trained_parts(state):
    """What is as it was after a training whose rate is 0."""
    names = [name for name in state if not re.search('running|num_batches', name)]
    assert len(names) > 50
    return {name: state[name] for name in names}


@pytest.mark.parametrize('layout', ['zip', 'legacy', 'safetensors'])
def test_a_training_starts_from_a_file_and_says_what_does_not(place, state, layout, tmp_path, capsys):
    path = tmp_path / 'given.pth'
    if layout == 'safetensors':
        safetensors({'state_dict': state}, path)
    else:
        saved({'state_dict': state, 'meta': Own()}, path, _use_new_zipfile_serialization=layout == 'zip')
    assert_arrived(trained_parts(place.start(path)), trained_parts(state))
    assert re.search(rf'{len(state)} of {len(state)} tensors of \w+ start from {path}\.\n', capsys.readouterr().out)


def test_a_training_of_other_classes_starts_from_all_else(place, state, tmp_path, capsys):
    given = {name: torch.cat([value] * 2) if 'head.heads' in name else value for name, value in state.items()}
    others = [name for name in state if given[name].shape != state[name].shape]
    path = saved({'state_dict': given}, tmp_path / 'given.pth')
    arrived = place.start(path)
    assert_arrived(*({n: v for n, v in trained_parts(part).items() if n not in others} for part in (arrived, state)))
    said = capsys.readouterr().out
    assert re.search(
        rf'{len(state) - len(others)} of {len(state)} tensors of \w+ start from {path}\. Others keep', said
    )
    assert f'{len(others)} of another shape ({others[0]}: ' in said


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda state: {f'net.{name}': value for name, value in state.items()},
            r'has nothing of \w+, which has \d+ tensors.*net\.',
        ),
        (lambda state: {name: value * torch.nan for name, value in state.items()}, 'NaN or infinite'),
    ],
)
def test_a_training_cannot_start_from_this(place, state, change, message, tmp_path):
    path = saved({'state_dict': change(state)}, tmp_path / 'given.pth')
    assert re.search(message, sentence(place.start, path))


def test_a_training_goes_on_from_its_own(place, trained, tmp_path):
    path = saved(trained, tmp_path / 'given.jpg')
    assert 'best_ckpt' in trained['message_hub']['runtime_info']
    assert isinstance(trained['message_hub']['log_scalars']['train/loss'], HistoryBuffer)
    assert check_training_checkpoint(path) == trained['meta']
    arrived = place.resume(path)
    assert_arrived(trained_parts(arrived), trained_parts(trained['state_dict']))


def test_a_config_that_resumes_by_itself_is_looked_at_too(place, trained, tmp_path):
    path = saved(trained, tmp_path / 'given.pth')
    start = functools.partial(place.start, options=['resume=True', 'train_cfg.max_epochs=2'])
    assert_arrived(trained_parts(start(path)), trained_parts(trained['state_dict']))
    mark = tmp_path / 'mark'
    saved(in_meta(trained, mark, Call(os.system, f'touch {mark}')), path)
    assert 'nothing of it was run' in sentence(start, path)
    assert not mark.exists()


@pytest.mark.skipif(not hasattr(torch.serialization, 'safe_globals'), reason='of torch 2.5')
def test_torch_reads_trainings_by_the_objects_that_are_admitted(trained, tmp_path):
    path = saved(trained, tmp_path / 'given.pth')
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    with torch.serialization.safe_globals(training_globals()):
        content = torch.load(path, weights_only=True)
        evil = saved(Call(getattr, HistoryBuffer.min, '__globals__'), tmp_path / 'evil.pth')
        with pytest.raises(pickle.UnpicklingError):
            torch.load(evil, weights_only=True)
    assert_arrived(content['state_dict'], trained['state_dict'])
    buffers = [content['message_hub']['log_scalars']['train/loss'], trained['message_hub']['log_scalars']['train/loss']]
    assert buffers[0].statistics('mean') == buffers[1].statistics('mean')


@pytest.mark.skipif(not hasattr(torch.serialization, 'safe_globals'), reason='of torch 2.5')
def test_a_class_of_ones_own_is_admitted_on_request(trained, tmp_path):
    path = saved(within('meta', own=Own())(trained), tmp_path / 'given.pth')
    with torch.serialization.safe_globals([Own]):
        assert check_training_checkpoint(path)['epoch'] == 1


# Files made to do harm. What they would run leaves a mark.


def called(content, mark, evil):
    return evil


def beside(content, mark, evil):
    return content | {'evil': evil}


def in_state_dict(content, mark, evil):
    return content | {'state_dict': {**content['state_dict'], 'evil': evil}}


def in_place_of_a_tensor(content, mark, evil):
    name = 'backbone.patch_embed.conv.0.conv.weight'
    return content | {'state_dict': {**content['state_dict'], name: evil}}


def in_meta(content, mark, evil):
    return content | {'meta': {**content['meta'], 'evil': evil}}


ATTACKS = {
    'called': called,
    'beside': beside,
    'in state_dict': in_state_dict,
    'in place of a tensor': in_place_of_a_tensor,
    'in meta': in_meta,
}
SEEN_TO = ('beside', 'in state_dict', 'in meta')  # the weights are all there, and the rest is not looked at


@pytest.mark.parametrize('name', ['convert', 'pretrained', 'test', 'resume', 'start'])
@pytest.mark.parametrize(
    ('attack', 'layout'),
    [*((attack, 'zip') for attack in ATTACKS), ('called', 'legacy'), ('called', 'pickle'), ('beside', 'legacy')],
)
def test_nothing_is_run(place, content, name, attack, layout, tmp_path):
    mark, path = tmp_path / 'mark', tmp_path / 'given.pth'
    content = ATTACKS[attack](content, mark, Call(os.system, f'touch {mark}'))
    if layout == 'pickle':
        path.write_bytes(pickle.dumps(content))
        pickle.loads(path.read_bytes())
    else:
        saved(content, path, _use_new_zipfile_serialization=layout == 'zip')
        torch.load(path, weights_only=False)
    assert mark.exists(), 'the attack itself does not work'
    mark.unlink()
    seen_to = (*SEEN_TO, 'in place of a tensor') if name == 'start' else SEEN_TO  # which may leave something out
    if name != 'resume' and layout != 'pickle' and attack in seen_to:
        getattr(place, name)(path)
    else:
        said = sentence(getattr(place, name), path)
        if name == 'resume' and layout == 'zip':
            assert f'{os.system.__module__}.system' in said
    assert not mark.exists()


@pytest.mark.parametrize('way', ['attribute', 'protocol 4', 'config'])
def test_nothing_is_run_on_the_way_to_a_training(place, trained, way, tmp_path):
    mark, path = tmp_path / 'mark', tmp_path / 'given.pth'
    command = f'touch {mark}'
    if way == 'config':  # mmengine's Runner.resume runs it
        text = f'import os\nos.system({command!r})\n'
        Config.fromstring(text, '.py')
        saved(within('meta', config=text)(trained), path)
        message = r"meta\['config'\]"
    else:
        # A function leads to its module's names, and those to builtins: no object but getattr is named.
        names = Call(getattr, HistoryBuffer.min, '__builtins__')
        evil = Call(Call(getattr, names, 'get'), 'eval') if way == 'attribute' else Call(os.system, command)
        if way == 'attribute':
            evil = Call(evil, f'__import__("os").system({command!r})')
        saved({'evil': evil, **trained}, path, pickle_protocol=2 if way == 'attribute' else 4)
        torch.load(path, weights_only=False)
        message = '__builtins__ of|min of|getattr' if way == 'attribute' else r'posix\.system|nt\.system'
    assert mark.exists(), 'the attack itself does not work'
    mark.unlink()
    assert re.search(message, sentence(place.resume, path))
    assert not mark.exists()
