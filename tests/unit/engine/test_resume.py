import argparse
import collections
import datetime
import decimal
import fractions
import pickle
import re
import shutil
import uuid
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from recorded_training import OwnLoop, train
from safetensors.torch import save_file

from mmevm.checkpoints import CheckpointError
from mmevm.engine import ResumableEpochLoop, latest_valid_checkpoint, make_resumable, resume
from mmevm.engine.training_state import check_training_checkpoint, find_unresumable, training_globals


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('trained')
    train(work_dir, options={'train_cfg.max_epochs': 1})
    return work_dir / 'epoch_1.pth'


def config(work_dir, **entries):
    return Config(dict(work_dir=str(work_dir), model=dict(type='Recorder'), train_cfg=dict(by_epoch=True), **entries))


def saved(path, checkpoint, **meta):
    """A checkpoint with other metadata."""
    path.parent.mkdir(exist_ok=True)
    return given(path, checkpoint, 'meta', **meta)


@pytest.mark.parametrize(
    ('checkpoints', 'latest'),
    [
        # names, and the epoch and iteration of each
        ({'epoch_2.pth': (2, 12), 'epoch_10.pth': (10, 60), 'epoch_9.pth': (9, 54)}, 'epoch_10.pth'),
        ({'epoch_2.pth': (2, 12), 'epoch_2_iter_15.pth': (2, 15)}, 'epoch_2_iter_15.pth'),
        ({'epoch_3.pth': (3, 18), 'epoch_2_iter_15.pth': (2, 15)}, 'epoch_3.pth'),
        ({'iter_900.pth': (0, 900), 'iter_1000.pth': (0, 1000), 'best_mAP_iter_2000.pth': (0, 2000)}, 'iter_1000.pth'),
        # CheckpointHook(by_epoch=False) with an epoch loop
        ({'iter_4.pth': (0, 4), 'epoch_1_iter_8.pth': (1, 8), 'iter_6.pth': (0, 6)}, 'epoch_1_iter_8.pth'),
        ({'iter_12.pth': (1, 12), 'epoch_1_iter_10.pth': (1, 10)}, 'iter_12.pth'),
        # CheckpointHook(filename_tmpl=…) of any kind
        ({'m4_step_5.pt': (5, 30), 'm4_step_12.pt': (12, 72)}, 'm4_step_12.pt'),
        ({'epoch_1.pth': (1, 6), '[m4] 002.ckpt': (2, 12)}, '[m4] 002.ckpt'),
        ({'latest': (1, 6)}, 'latest'),
    ],
)
@pytest.mark.parametrize('folder', ['work', 'w [1-9] *'])
def test_resume_uses_the_checkpoint_after_the_most_iterations(checkpoint, tmp_path, checkpoints, latest, folder):
    work_dir = tmp_path / folder
    for name, (epoch, iteration) in checkpoints.items():
        saved(work_dir / name, checkpoint, epoch=epoch, iter=iteration)
    (work_dir / 'last_checkpoint').write_text('')  # a process died while it wrote it
    np.savez(work_dir / 'results_99.npz', x=np.ones(1))  # a zip too
    torch.save({'state_dict': {'weight': torch.ones(1)}}, work_dir / 'converted.pth')
    cfg = config(work_dir, default_hooks=dict())
    resume(cfg)
    assert cfg.load_from == str(work_dir / latest)


def test_after_the_same_iteration_the_place_within_the_epoch_is_preferred(checkpoint, tmp_path):
    saved(tmp_path / 'iter_8.pth', checkpoint, epoch=1, iter=8)
    saved(tmp_path / 'epoch_1_iter_8.pth', checkpoint, epoch=1, iter=8, trained=2, batches_of_epoch=6)
    assert latest_valid_checkpoint(tmp_path)[0] == tmp_path / 'epoch_1_iter_8.pth'


@pytest.mark.parametrize(
    ('filename_tmpl', 'by_epoch'), [('m4-{}.pt', True), ('step {:06d}.ckpt', False), ('saved/{}.pth', True)]
)
def test_checkpoints_of_another_filename_tmpl_are_resumed(tmp_path, filename_tmpl, by_epoch):
    hook = dict(type='CheckpointHook', filename_tmpl=filename_tmpl, by_epoch=by_epoch, interval=1)
    train(tmp_path, options={'default_hooks.checkpoint': hook, 'train_cfg.max_epochs': 1})
    cfg = config(tmp_path, default_hooks=dict(checkpoint=hook))
    resume(cfg)
    assert cfg.load_from == str(tmp_path / filename_tmpl.format(1 if by_epoch else 6))


def test_damaged_checkpoints_are_named_and_the_latest_valid_one_is_used(checkpoint, tmp_path, capsys):
    saved(tmp_path / 'epoch_1.pth', checkpoint, epoch=1, iter=6)
    saved(tmp_path / 'epoch_4.pth', checkpoint, epoch=4, iter=24)
    (tmp_path / 'epoch_2.pth').write_bytes(checkpoint.read_bytes()[:-100])
    (tmp_path / 'epoch_3.pth').touch()
    weight = next(iter(torch.load(checkpoint, weights_only=False)['state_dict'].values())).numpy().tobytes()
    data = (tmp_path / 'epoch_4.pth').read_bytes()
    (tmp_path / 'epoch_4.pth').write_bytes(data.replace(weight, b'x' * len(weight)))  # its metadata can be read
    path, _ = latest_valid_checkpoint(tmp_path)
    assert path == tmp_path / 'epoch_1.pth'
    printed = capsys.readouterr().out
    for name in ('epoch_2.pth', 'epoch_3.pth', 'epoch_4.pth'):
        assert str(tmp_path / name) in printed


@pytest.mark.skipif(not hasattr(torch.serialization, 'set_crc32_options'), reason='of torch 2.6')
def test_resume_uses_checkpoints_without_checksums(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(content, tmp_path / 'epoch_1.pth')
    finally:
        torch.serialization.set_crc32_options(True)
    assert latest_valid_checkpoint(tmp_path)[0] == tmp_path / 'epoch_1.pth'


def test_reading_the_metadata_runs_nothing(checkpoint, tmp_path):
    (tmp_path / 'work').mkdir()
    content = torch.load(checkpoint, weights_only=False)
    content['meta'].update(iter=7, trap=Trap(tmp_path / 'sprung'))
    torch.save(content, tmp_path / 'work' / 'epoch_2.pth')
    shutil.copy(checkpoint, tmp_path / 'work' / 'epoch_1.pth')
    assert latest_valid_checkpoint(tmp_path / 'work')[0].name == 'epoch_1.pth'
    assert not (tmp_path / 'sprung').exists()


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), 'w')


def test_only_damaged_ones_are_an_error(tmp_path):
    """Beginning anew would write over what can perhaps be mended."""
    (tmp_path / 'epoch_2.pth').write_bytes(b'PK')
    with pytest.raises(CheckpointError, match=r'None of the checkpoints in .*epoch_2.pth'):
        resume(config(tmp_path, default_hooks=dict()))


def test_weights_alone_under_the_name_of_a_checkpoint_are_an_error(tmp_path):
    torch.save({'state_dict': {'weight': torch.ones(1)}}, tmp_path / 'm4_2.pt')
    hook = dict(type='CheckpointHook', filename_tmpl='m4_{}.pt')
    with pytest.raises(CheckpointError, match=r'None of the checkpoints in .*m4_2.pt'):
        resume(config(tmp_path, default_hooks=dict(checkpoint=hook)))


def test_an_empty_folder_is_a_training_from_the_start(tmp_path, capsys):
    cfg = config(tmp_path, default_hooks=dict(), load_from='pretrained.pth')
    resume(cfg)
    assert 'the training starts anew' in capsys.readouterr().out
    assert cfg.load_from == 'safe://pretrained.pth'
    assert not cfg.get('resume')


def test_the_folder_of_the_hook_is_searched_too(checkpoint, tmp_path):
    work_dir, out_dir = tmp_path / 'work', tmp_path / 'out'
    (out_dir / 'work').mkdir(parents=True)
    shutil.copy(checkpoint, out_dir / 'work' / 'epoch_1.pth')
    cfg = config(work_dir, default_hooks=dict(checkpoint=dict(type='CheckpointHook', out_dir=str(out_dir))))
    resume(cfg)
    assert cfg.load_from == str(out_dir / 'work' / 'epoch_1.pth')


def test_the_seed_goes_on_and_pretrained_weights_are_not_fetched(checkpoint, tmp_path):
    cfg = config(tmp_path, default_hooks=dict())
    cfg.model.backbone = dict(init_cfg=dict(type='Pretrained', checkpoint='timm://…'))
    resume(cfg, str(checkpoint))
    assert cfg.randomness.seed == check_training_checkpoint(checkpoint)['seed'] == 0
    assert cfg.model.backbone.init_cfg is None
    cfg = config(tmp_path, default_hooks=dict(), randomness=dict(seed=5))
    resume(cfg, str(checkpoint))
    assert cfg.randomness.seed == 5


@pytest.mark.parametrize(
    ('train_cfg', 'loop'),
    [
        (dict(by_epoch=True, max_epochs=1), 'mmevm.ResumableEpochLoop'),
        (dict(by_epoch=False, max_iters=1), 'mmevm.ResumableIterLoop'),
        (dict(max_epochs=1), 'mmevm.ResumableEpochLoop'),
        (dict(max_iters=1), 'mmevm.ResumableIterLoop'),
        (dict(type='EpochBasedTrainLoop', max_epochs=1), 'mmevm.ResumableEpochLoop'),
        (dict(type='mmengine.IterBasedTrainLoop', max_iters=1), 'mmevm.ResumableIterLoop'),
        (dict(type=EpochBasedTrainLoop, max_epochs=1), 'mmevm.ResumableEpochLoop'),
        (dict(type=IterBasedTrainLoop, max_iters=1), 'mmevm.ResumableIterLoop'),
        (dict(type='mine.Loop', max_epochs=1), 'mine.Loop'),
        (dict(type=OwnLoop, max_epochs=1), OwnLoop),
    ],
)
def test_mmengine_loops_become_resumable(tmp_path, train_cfg, loop):
    cfg = Config(dict(work_dir=str(tmp_path), train_cfg=train_cfg))
    make_resumable(cfg)
    assert cfg.train_cfg.type == loop
    assert 'by_epoch' not in cfg.train_cfg
    assert cfg.default_hooks.checkpoint.backend_args == dict(backend='mmevm.atomic')


@pytest.mark.parametrize('default_hooks', [..., None, {}, {'logger': dict(type='LoggerHook')}])
def test_without_a_checkpoint_hook_in_the_config_mmengine_saves_each_epoch(tmp_path, default_hooks):
    cfg = Config(dict(work_dir=str(tmp_path), train_cfg=dict(by_epoch=True, max_epochs=1)))
    if default_hooks is not ...:
        cfg.default_hooks = default_hooks
    make_resumable(cfg)
    assert cfg.default_hooks.checkpoint.interval == 1
    assert cfg.default_hooks.checkpoint.backend_args == dict(backend='mmevm.atomic')


@pytest.mark.parametrize(
    ('hook', 'backend_args'),
    [
        (dict(type=CheckpointHook), dict(backend='mmevm.atomic')),
        (dict(type='mmengine.CheckpointHook', backend_args=None), dict(backend='mmevm.atomic')),
        (dict(type='CheckpointHook', backend_args=dict(backend='petrel')), dict(backend='petrel')),
        (dict(type='CheckpointHook', file_client_args=dict(backend='disk')), None),
        (dict(type='mine.Hook'), None),
        (None, None),
    ],
)
def test_a_checkpoint_hook_of_mmengine_saves_with_the_atomic_backend(tmp_path, hook, backend_args):
    cfg = Config(dict(work_dir=str(tmp_path), default_hooks=dict(checkpoint=hook), train_cfg=None, custom_hooks=None))
    make_resumable(cfg)
    assert (cfg.default_hooks.checkpoint or {}).get('backend_args') == backend_args
    assert [hook.type for hook in cfg.custom_hooks] == ['mmevm.CheckpointCheckHook', 'mmevm.PreemptionHook']


PURE_PYTHON = {
    'base.py': """
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook, LoggerHook
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop
from recorded_training import Augmented, Recorder
from torch.optim import SGD

model = dict(type=Recorder, head=dict(type=Recorder, init_cfg=dict(type='Pretrained', checkpoint='nowhere.pth')))
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type=DefaultSampler, shuffle=True), dataset=dict(type=Augmented)
)
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=2)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=0.1))
default_hooks = dict(checkpoint=dict(type=CheckpointHook, interval=1), logger=dict(type=LoggerHook))
log_level = 'WARNING'
""",
    'config.py': """
from mmengine.config import read_base

with read_base():
    from .base import *

train_cfg.update(max_epochs=3)
model.pop('head')
""",
}


def test_a_pure_python_config_trains_and_is_resumed(tmp_path):
    for name, text in PURE_PYTHON.items():
        (tmp_path / name).write_text(text)

    def build(checkpoint=None):
        cfg = Config.fromfile(tmp_path / 'config.py')
        cfg.work_dir = str(tmp_path / 'work')
        cfg.experiment_name = f'{tmp_path}{checkpoint}'
        make_resumable(cfg)
        if checkpoint:
            resume(cfg)
            assert cfg.load_from == str(checkpoint)
        return Runner.from_cfg(cfg)

    run = build()
    assert isinstance(run.train_loop, ResumableEpochLoop)
    (hook,) = [hook for hook in run.hooks if isinstance(hook, CheckpointHook)]
    assert hook.backend_args == dict(backend='mmevm.atomic')
    run.train()
    assert len(run.model.seen) == 18
    (dumped,) = (tmp_path / 'work').glob('*.py')
    assert 'mmevm.ResumableEpochLoop' in dumped.read_text()
    (tmp_path / 'work' / 'epoch_3.pth').unlink()
    again = build(tmp_path / 'work' / 'epoch_2.pth')
    again.train()
    assert again.model.seen == run.model.seen[12:]


def test_a_remote_folder_keeps_its_backend(tmp_path):
    hook = dict(type='CheckpointHook', out_dir='s3://bucket/runs')
    cfg = Config(dict(work_dir=str(tmp_path), train_cfg=dict(by_epoch=True), default_hooks=dict(checkpoint=hook)))
    make_resumable(cfg)
    assert 'backend_args' not in cfg.default_hooks.checkpoint


@pytest.mark.skipif(not hasattr(torch.serialization, 'safe_globals'), reason='torch < 2.5 reads all or nothing')
def test_what_is_saved_can_be_read_by_torch_alone(checkpoint):
    with torch.serialization.safe_globals(training_globals()):
        assert torch.load(checkpoint, weights_only=True)['meta']['iter'] == 6


# What is looked at before a training goes on


def given(path, checkpoint, entry=None, **values):
    """The checkpoint with other values in one of its dicts; those that are ``...`` are not there."""
    content = torch.load(checkpoint, weights_only=False)
    part = content
    for name in entry.split('/') if entry else ():
        part = part[name]
    part.update(values)
    for name in [name for name in part if part[name] is ...]:
        del part[name]
    torch.save(content, path, pickle_protocol=2)
    return path


GOES_ON = [
    (None, dict(param_schedulers=..., more=[1])),
    ('meta', dict(epoch=0, iter=0, seed=...)),
    (None, dict(optimizer=...)),  # save_optimizer=False
    ('state_dict', dict(count=torch.tensor(3), flag=torch.tensor(True))),
    ('state_dict', dict(mask=torch.tensor([0, -torch.inf]), best=torch.tensor(torch.nan))),  # valid buffers
    ('message_hub/runtime_info', dict(best_ckpt=None, keep_ckpt_ids=[])),
    ('message_hub/runtime_info', dict(best_ckpt='/w/best_accuracy_epoch_1.pth', keep_ckpt_ids=[1, 20])),
    ('message_hub/runtime_info', dict(best_ckpt='/w/best_accuracy_m4_1.pt')),
    ('message_hub/runtime_info', dict(best_ckpt_mAP='best_mAP_iter_7.pth', best_score='x', other=['x'])),
    ('message_hub/log_scalars', dict(own=HistoryBuffer([1.0], [1]), mean=HistoryBuffer.mean)),
]


@pytest.mark.parametrize(('entry', 'values'), GOES_ON)
def test_a_training_can_go_on(checkpoint, tmp_path, entry, values):
    path = given(tmp_path / 'x.pth', checkpoint, entry, **values)
    assert check_training_checkpoint(path) == torch.load(path, weights_only=False)['meta']


METADATA = dict(
    date=datetime.date(2026, 1, 2),
    datetime=datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.timezone(datetime.timedelta(hours=2))),
    time=datetime.time(3, 4),
    path=Path('data/coco'),
    other_path=PureWindowsPath('C:/data'),
    decimal=decimal.Decimal('0.1'),
    fraction=fractions.Fraction(1, 3),
    uuid=uuid.UUID(int=3),
    counter=collections.Counter('aab'),
    ordered=collections.OrderedDict(a=1),
    range=range(3),
    slice=slice(1, 2),
    set={1, 2},
    frozen=frozenset({'a'}),
    complex=1j,
    bytes=b'abc',
    array=bytearray(b'abc'),
    big=2**100,
    arguments=argparse.Namespace(lr=0.1),
    config_dict=ConfigDict(a=dict(b=[1])),
    dtype=torch.float16,
    device=torch.device('cpu'),
    size=torch.Size([2]),
    scalars=[np.float32(0.5), np.int64(3), np.bool_(True), np.complex64(1j), np.str_('a'), np.datetime64('2026-01-02')],
    arrays={
        'text': np.array(['a', 'bc']),
        'objects': np.array([1, 'a', None], dtype=object),
        'records': np.zeros(2, dtype=[('a', 'i4'), ('b', 'f8')]),
    },
)


@pytest.mark.parametrize('name', METADATA)
def test_plain_metadata_is_admitted_by_the_check_and_by_torch(checkpoint, tmp_path, name):
    path = given(tmp_path / 'x.pth', checkpoint, 'meta', own=METADATA[name])
    check_training_checkpoint(path)
    if hasattr(torch.serialization, 'safe_globals'):
        with torch.serialization.safe_globals(training_globals()):
            assert str(torch.load(path, weights_only=True)['meta']['own']) == str(METADATA[name])


def test_what_a_resume_refuses_is_found_in_what_is_saved(checkpoint):
    content = torch.load(checkpoint, weights_only=False)
    content['meta'].update(METADATA)
    assert find_unresumable(content | {'optimizer': {'state': {0: torch.nn.Parameter(torch.ones(1))}}}) == []
    content['meta'].update(a=[{'b': Own()}, Own()], c=HistoryBuffer.update)
    content['message_hub']['runtime_info'].update(best_ckpt='/w/epoch_1.pth')
    first, second, third = find_unresumable(content)
    assert first.startswith(f'meta.a.0.b names {__name__}.Own: ')
    assert second.startswith(f'meta.c names update of {HistoryBuffer.__module__}.HistoryBuffer: ')
    assert "has '/w/epoch_1.pth' as its best_ckpt" in third


ONLY = 'holds weights only: a training can start from it (init_cfg or load_from), but not be resumed'
REMOVES = ', which mmengine would remove after the next checkpoint'


@pytest.mark.parametrize(
    ('entry', 'values', 'problem'),
    [
        *((None, {name: ...}, f'{ONLY}, for which {name} w') for name in ('state_dict', 'meta', 'message_hub')),
        *((None, {name: {}}, f'{ONLY}, for which {name} w') for name in ('state_dict', 'meta', 'message_hub')),
        (None, dict(optimizer=[1], message_hub=None), f'{ONLY}, for which message_hub, optimizer would be needed'),
        ('meta', dict(epoch=True), 'does not say after which epoch'),
        ('meta', dict(epoch='2'), 'does not say after which epoch'),
        ('meta', dict(epoch=-1), 'does not say after which epoch'),
        ('meta', dict(iter=-1), 'does not say after which epoch'),
        ('meta', dict(iter=...), 'does not say after which epoch'),
        ('meta', dict(config='import os'), "has a meta['config'], which mmengine would run"),
        ('message_hub', dict(log_scalars=...), "has a message_hub that is not mmengine's"),
        ('message_hub', dict(runtime_info=[]), "has a message_hub that is not mmengine's"),
        ('message_hub', dict(resumed_keys=None), "has a message_hub that is not mmengine's"),
        *(
            ('message_hub/runtime_info', {name: value}, f'has {value!r} as its {name}{REMOVES}')
            for name, value in [
                ('best_ckpt', '/w/epoch_1.pth'),
                ('best_ckpt', '/w/best_x.pth/notes.txt'),
                ('best_ckpt_mAP', 5),
                ('best_ckpt_mAP', 'my_best_x.pth'),
                ('keep_ckpt_ids', ['../x']),
                ('keep_ckpt_ids', [1, True]),
                ('keep_ckpt_ids', (1,)),
                ('keep_ckpt_ids', None),
            ]
        ),
        *(
            ('state_dict', {name: torch.tensor([1.0, number])}, f'NaN or infinite numbers ({name})')
            for name in ('x.weight', 'x.bias', 'x.running_mean', 'x.running_var')
            for number in (torch.nan, torch.inf)
        ),
        (
            'meta',
            dict(own=HistoryBuffer.update),
            f'names update of {HistoryBuffer.__module__}.HistoryBuffer, which a t',
        ),
        ('meta', dict(own=shutil.Error), 'names shutil.Error, which a training does not save'),
    ],
)
def test_a_training_cannot_go_on(checkpoint, tmp_path, entry, values, problem):
    path = given(tmp_path / 'x.pth', checkpoint, entry, **values)
    with pytest.raises(CheckpointError, match=re.escape(problem)) as error:
        check_training_checkpoint(path)
    assert str(path) in str(error.value)


def test_a_training_is_a_dict_in_torchs_present_format(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    content = torch.load(checkpoint, weights_only=False)
    data, weight = checkpoint.read_bytes(), next(iter(content['state_dict'].values())).numpy().tobytes()
    place = data.index(weight)
    path = tmp_path / 'x.pth'
    for save, problem in [
        (lambda: torch.save(content, path, _use_new_zipfile_serialization=False), f'{path} is in torch.* old format'),
        (lambda: save_file({'w': torch.ones(1)}, path), re.escape(f'{path} {ONLY}.') + '$'),
        (lambda: torch.save([1], path), f'A checkpoint is a dict, but {path} holds a list'),
        (lambda: path.write_bytes(data[:-9]), f'{path} .*cut off or damaged'),
        (lambda: path.write_bytes(data[:place] + b'x' + data[place + 1 :]), f'{path} .*cut off or damaged'),
        (path.unlink, f'no checkpoint .*{path}'),
    ]:
        save()
        with pytest.raises(CheckpointError, match=problem):
            check_training_checkpoint('~/x.pth')
    shutil.copy(checkpoint, path)
    assert check_training_checkpoint('~/x.pth') == content['meta']


class Own:
    """A class of somebody's own."""


@pytest.mark.skipif(not hasattr(torch.serialization, 'safe_globals'), reason='of torch 2.5')
def test_what_is_admitted_by_name_is_admitted(checkpoint, tmp_path):
    path = given(tmp_path / 'x.pth', checkpoint, 'meta', own=Own())
    with pytest.raises(CheckpointError, match=rf'{__name__}\.Own'):
        check_training_checkpoint(path)
    with torch.serialization.safe_globals([(Own, f'{__name__}.Own')]):
        assert check_training_checkpoint(path)['epoch'] == 1


@pytest.mark.skipif(not hasattr(torch.serialization, 'safe_globals'), reason='torch < 2.5 reads all or nothing')
def test_torch_alone_reads_numbers_of_all_types_and_no_other_attribute(tmp_path):
    path = tmp_path / 'x.pth'
    numbers = {code: np.array([1, 2], code) for code in 'bBhHiIlLqQefd?'}
    with torch.serialization.safe_globals(training_globals()):
        torch.save({**numbers, 'scalar': np.float64(1.5), 'mean': HistoryBuffer.mean}, path, pickle_protocol=2)
        read = torch.load(path, weights_only=True)
        assert all(np.array_equal(read[code], numbers[code]) for code in numbers)
        assert (read['scalar'], read['mean']) == (1.5, HistoryBuffer.mean)
        torch.save({'update': HistoryBuffer.update}, path, pickle_protocol=2)
        with pytest.raises(pickle.UnpicklingError, match=r'update of .*HistoryBuffer.* is not admitted'):
            torch.load(path, weights_only=True)
    assert len(set(training_globals())) == len(training_globals())
