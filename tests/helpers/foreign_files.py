"""Places of the package that read a file, and ways to save one."""

import functools
import pickle
import re

import pytest
import torch
from command_line import ROOT, run_here
from mmengine.runner import runner
from safetensors.torch import save_file

from mmevm.checkpoints import CheckpointError
from mmevm.models import EfficientViM

ARCH = dict(embed_dims=(16, 24), depths=(1, 1), state_dims=(4, 4))
# Small, with an EMAHook, schedulers whose states hold objects, and a learning rate of 0, which keeps the weights.
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


# cached, because it runs compilers for their versions
ENVIRONMENT = functools.cache(runner.collect_env)


# The places that build a runner take longer.
PLACES = [
    'convert',
    'pretrained',
    *(pytest.param(name, marks=pytest.mark.slow) for name in ('test', 'resume', 'start')),
]


class Place:
    """The places of the package that read a file. Each method returns what was loaded, or raises an error."""

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


def sentence(run, path):
    """What is printed of a file that is refused."""
    with pytest.raises((SystemExit, CheckpointError)) as error:
        run(path)
    if error.type is SystemExit:
        assert isinstance(error.value.code, str)  # printed, with exit code 1
        printed = error.value.code.removeprefix('CheckpointError: ')
        assert printed != error.value.code
    else:
        printed = str(error.value)
    assert str(path) in printed
    assert printed.endswith('.')
    assert '\n' not in printed
    return printed


def saved(content, path, **options):
    torch.save(content, path, **options)
    return path


def safetensors(content, path):
    save_file({name: tensor.contiguous() for name, tensor in content['state_dict'].items()}, path)
    return path


def half(state):
    return {name: state[name] for i, name in enumerate(state) if i % 2}


def other_arch(state):
    other = EfficientViM('m2').state_dict()
    return {f'backbone.{name}': tensor for name, tensor in other.items()}


def assert_arrived(arrived, expected):
    """Compare the values in any precision."""
    assert expected.keys() == arrived.keys()
    for name, tensor in expected.items():
        assert torch.equal(arrived[name].double(), tensor.double()), name


def trained_parts(state):
    """Return the tensors that a training with learning rate 0 does not change."""
    names = [name for name in state if not re.search('running|num_batches', name)]
    assert len(names) > 50
    return {name: state[name] for name in names}


def within(entry, **values):
    return lambda content: content | {entry: content[entry] | values}


class Custom:
    """A harmless custom class."""
