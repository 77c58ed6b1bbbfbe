import argparse
import collections
import datetime
import decimal
import fractions
import re
import shutil
import uuid
import zipfile
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from recorded_training import CustomLoop, train
from safetensors.torch import save_file

from mmevm.checkpoints import CheckpointError
from mmevm.engine import ResumableEpochLoop, latest_valid_checkpoint, make_resumable, resume
from mmevm.engine.training_state import check_training_checkpoint, find_unresumable, read_training_checkpoint


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('trained')
    train(work_dir, options={'train_cfg.max_epochs': 1})
    return work_dir / 'epoch_1.pth'


def config(work_dir, **entries):
    return Config(dict(work_dir=str(work_dir), model=dict(type='Recorder'), train_cfg=dict(by_epoch=True), **entries))


def saved(path, checkpoint, **meta):
    """Save the checkpoint with other metadata."""
    path.parent.mkdir(exist_ok=True)
    return with_values(path, checkpoint, 'meta', **meta)


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
    (work_dir / 'last_checkpoint').write_text('')  # a process was killed while it wrote it
    np.savez(work_dir / 'results_99.npz', x=np.ones(1))  # a zip too
    torch.save({'state_dict': {'weight': torch.ones(1)}}, work_dir / 'converted.pth')
    cfg = config(work_dir, default_hooks=dict())
    resume(cfg)
    assert cfg.load_from == f'resume://{work_dir / latest}'


def test_checkpoint_with_place_in_epoch_is_preferred_for_the_same_iteration(checkpoint, tmp_path):
    saved(tmp_path / 'iter_8.pth', checkpoint, epoch=1, iter=8)
    saved(tmp_path / 'epoch_1_iter_8.pth', checkpoint, epoch=1, iter=8, trained=2, batches_of_epoch=6)
    assert latest_valid_checkpoint(tmp_path)[0] == tmp_path / 'epoch_1_iter_8.pth'


@pytest.mark.parametrize(
    ('filename_tmpl', 'by_epoch'), [('m4-{}.pt', True), ('step {:06d}.ckpt', False), ('saved/{}.pth', True)]
)
def test_resume_finds_checkpoints_of_any_filename_tmpl(tmp_path, filename_tmpl, by_epoch):
    hook = dict(type='CheckpointHook', filename_tmpl=filename_tmpl, by_epoch=by_epoch, interval=1)
    train(tmp_path, options={'default_hooks.checkpoint': hook, 'train_cfg.max_epochs': 1})
    cfg = config(tmp_path, default_hooks=dict(checkpoint=hook))
    resume(cfg)
    assert cfg.load_from == f'resume://{tmp_path / filename_tmpl.format(1 if by_epoch else 6)}'


def test_resume_uses_latest_valid_checkpoint_and_logs_damaged_ones(checkpoint, tmp_path, capsys):
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


def test_reading_metadata_runs_no_code(checkpoint, tmp_path):
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


def test_only_damaged_checkpoints_are_an_error(tmp_path):
    """A training from the beginning would overwrite files that can perhaps be repaired."""
    (tmp_path / 'epoch_2.pth').write_bytes(b'PK')
    with pytest.raises(CheckpointError, match=r'None of the checkpoints in .*epoch_2.pth'):
        resume(config(tmp_path, default_hooks=dict()))


def test_weights_under_a_checkpoint_name_are_an_error(tmp_path):
    torch.save({'state_dict': {'weight': torch.ones(1)}}, tmp_path / 'm4_2.pt')
    hook = dict(type='CheckpointHook', filename_tmpl='m4_{}.pt')
    with pytest.raises(CheckpointError, match=r'None of the checkpoints in .*m4_2.pt'):
        resume(config(tmp_path, default_hooks=dict(checkpoint=hook)))


def test_resume_without_checkpoints_starts_from_the_beginning(tmp_path, capsys):
    cfg = config(tmp_path, default_hooks=dict(), load_from='pretrained.pth')
    resume(cfg)
    assert 'the training starts from the beginning' in capsys.readouterr().out
    assert cfg.load_from == 'safe://pretrained.pth'
    assert not cfg.get('resume')


def test_resume_searches_out_dir_of_the_checkpoint_hook(checkpoint, tmp_path):
    work_dir, out_dir = tmp_path / 'work', tmp_path / 'out'
    (out_dir / 'work').mkdir(parents=True)
    shutil.copy(checkpoint, out_dir / 'work' / 'epoch_1.pth')
    cfg = config(work_dir, default_hooks=dict(checkpoint=dict(type='CheckpointHook', out_dir=str(out_dir))))
    resume(cfg)
    assert cfg.load_from == f'resume://{out_dir}/work/epoch_1.pth'


def test_resume_keeps_the_seed_and_downloads_no_pretrained_weights(checkpoint, tmp_path):
    cfg = config(tmp_path, default_hooks=dict())
    cfg.model.backbone = dict(init_cfg=dict(type='Pretrained', checkpoint='timm://…'))
    resume(cfg, str(checkpoint))
    assert cfg.randomness.seed == check_training_checkpoint(checkpoint)['seed'] == 0
    assert cfg.model.backbone.init_cfg is None
    cfg = config(tmp_path, default_hooks=dict(), randomness=dict(seed=5))
    resume(cfg, f'resume://{checkpoint}')
    assert cfg.randomness.seed == 5
    assert cfg.load_from == f'resume://{checkpoint}'
    with pytest.raises(CheckpointError, match=r's3://bucket/epoch_1\.pth is not a local file'):
        resume(cfg, 's3://bucket/epoch_1.pth')


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
        (dict(type=CustomLoop, max_epochs=1), CustomLoop),
    ],
)
def test_make_resumable_replaces_mmengine_loops(tmp_path, train_cfg, loop):
    cfg = Config(dict(work_dir=str(tmp_path), train_cfg=train_cfg))
    make_resumable(cfg)
    assert cfg.train_cfg.type == loop
    assert 'by_epoch' not in cfg.train_cfg
    assert cfg.default_hooks.checkpoint.backend_args == dict(backend='mmevm.atomic')


@pytest.mark.parametrize('default_hooks', [..., None, {}, {'logger': dict(type='LoggerHook')}])
def test_make_resumable_adds_a_checkpoint_hook(tmp_path, default_hooks):
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
def test_make_resumable_sets_the_atomic_backend(tmp_path, hook, backend_args):
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


def test_pure_python_config_is_trained_and_resumed(tmp_path):
    for name, text in PURE_PYTHON.items():
        (tmp_path / name).write_text(text)

    def build(checkpoint=None):
        cfg = Config.fromfile(tmp_path / 'config.py')
        cfg.work_dir = str(tmp_path / 'work')
        cfg.experiment_name = f'{tmp_path}{checkpoint}'
        make_resumable(cfg)
        if checkpoint:
            resume(cfg)
            assert cfg.load_from == f'resume://{checkpoint}'
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


def test_remote_out_dir_keeps_its_backend(tmp_path):
    hook = dict(type='CheckpointHook', out_dir='s3://bucket/runs')
    cfg = Config(dict(work_dir=str(tmp_path), train_cfg=dict(by_epoch=True), default_hooks=dict(checkpoint=hook)))
    make_resumable(cfg)
    assert 'backend_args' not in cfg.default_hooks.checkpoint


# Checks of the content of a training checkpoint


def with_values(path, checkpoint, entry=None, **values):
    """Save the checkpoint with other values in one of its dicts; ``...`` removes an entry."""
    content = torch.load(checkpoint, weights_only=False)
    part = content
    for name in entry.split('/') if entry else ():
        part = part[name]
    part.update(values)
    for name in [name for name in part if part[name] is ...]:
        del part[name]
    torch.save(content, path, pickle_protocol=2)
    return path


RESUMABLE = [
    (None, dict(param_schedulers=..., more=[1])),
    ('meta', dict(epoch=0, iter=0, seed=...)),
    (None, dict(optimizer=...)),  # save_optimizer=False
    ('state_dict', dict(count=torch.tensor(3), flag=torch.tensor(True))),
    ('state_dict', dict(mask=torch.tensor([0, -torch.inf]), best=torch.tensor(torch.nan))),  # valid buffers
    ('message_hub/runtime_info', dict(best_ckpt=None, keep_ckpt_ids=[])),
    ('message_hub/runtime_info', dict(best_ckpt='/w/best_accuracy_epoch_1.pth', keep_ckpt_ids=[1, 20])),
    ('message_hub/runtime_info', dict(best_ckpt='/w/best_accuracy_m4_1.pt')),
    ('message_hub/runtime_info', dict(best_ckpt_mAP='best_mAP_iter_7.pth', best_score='x', other=['x'])),
    ('message_hub/log_scalars', dict(custom=HistoryBuffer([1.0], [1]), mean=HistoryBuffer.mean)),
]


@pytest.mark.parametrize(('entry', 'values'), RESUMABLE)
def test_resumable_checkpoints_are_accepted(checkpoint, tmp_path, entry, values):
    path = with_values(tmp_path / 'x.pth', checkpoint, entry, **values)
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
    empty=[b'', np.zeros(0)],
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
def test_plain_metadata_is_read_as_it_was_saved(checkpoint, tmp_path, name):
    path = with_values(tmp_path / 'x.pth', checkpoint, 'meta', custom=METADATA[name])
    value = read_training_checkpoint(path)['meta']['custom']
    assert type(value) is type(METADATA[name])
    assert str(value) == str(METADATA[name])


def test_training_checkpoint_is_read_as_by_torch(checkpoint):
    expected, content = torch.load(checkpoint, weights_only=False), read_training_checkpoint(checkpoint)
    assert content.keys() == expected.keys()
    for entry in expected.keys() - {'message_hub'}:
        assert str(content[entry]) == str(expected[entry])
    for name, buffer in expected['message_hub'].pop('log_scalars').items():
        assert isinstance(content['message_hub']['log_scalars'][name], HistoryBuffer)
        assert np.array_equal(content['message_hub']['log_scalars'][name].data, buffer.data)
    assert content['message_hub']['runtime_info'] == expected['message_hub']['runtime_info']


def test_find_unresumable_reports_what_resume_refuses(checkpoint):
    content = torch.load(checkpoint, weights_only=False)
    content['meta'].update(METADATA)
    assert find_unresumable(content | {'optimizer': {'state': {0: torch.nn.Parameter(torch.ones(1))}}}) == []
    content['meta'].update(a=[{'b': Custom()}, Custom()], c=HistoryBuffer.update)
    content['message_hub']['runtime_info'].update(best_ckpt='/w/epoch_1.pth')
    first, second, third = find_unresumable(content)
    assert first.startswith(f'meta.a.0.b contains {__name__}.Custom, ')
    assert second.startswith(f'meta.c contains update of {HistoryBuffer.__module__}.HistoryBuffer, ')
    assert "has best_ckpt='/w/epoch_1.pth'" in third


ONLY = 'holds weights only: a training can start from it (init_cfg or load_from), but not be resumed'
REMOVES = ', which mmengine would remove after the next checkpoint'


@pytest.mark.parametrize(
    ('entry', 'values', 'problem'),
    [
        *((None, {name: ...}, f'{ONLY}, which needs {name}.') for name in ('state_dict', 'meta', 'message_hub')),
        *((None, {name: {}}, f'{ONLY}, which needs {name}.') for name in ('state_dict', 'meta', 'message_hub')),
        (None, dict(optimizer=[1], message_hub=None), f'{ONLY}, which needs message_hub, optimizer.'),
        ('meta', dict(epoch=True), "has no valid meta['epoch'] and meta['iter']"),
        ('meta', dict(epoch='2'), "has no valid meta['epoch'] and meta['iter']"),
        ('meta', dict(epoch=-1), "has no valid meta['epoch'] and meta['iter']"),
        ('meta', dict(iter=-1), "has no valid meta['epoch'] and meta['iter']"),
        ('meta', dict(iter=...), "has no valid meta['epoch'] and meta['iter']"),
        ('meta', dict(config='import os'), "has a meta['config'], which mmengine would run"),
        ('message_hub', dict(log_scalars=...), "has a message_hub that is not mmengine's"),
        ('message_hub', dict(runtime_info=[]), "has a message_hub that is not mmengine's"),
        ('message_hub', dict(resumed_keys=None), "has a message_hub that is not mmengine's"),
        *(
            ('message_hub/runtime_info', {name: value}, f'has {name}={value!r}{REMOVES}')
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
            ('state_dict', {name: torch.tensor([1.0, number])}, f'NaN or infinite values ({name})')
            for name in ('x.weight', 'x.bias', 'x.running_mean', 'x.running_var')
            for number in (torch.nan, torch.inf)
        ),
        (
            'meta',
            dict(custom=HistoryBuffer.update),
            f'names update of {HistoryBuffer.__module__}.HistoryBuffer, which a t',
        ),
        ('meta', dict(custom=shutil.Error), 'names shutil.Error, which a training does not save'),
    ],
)
def test_unresumable_checkpoints_are_refused(checkpoint, tmp_path, entry, values, problem):
    path = with_values(tmp_path / 'x.pth', checkpoint, entry, **values)
    with pytest.raises(CheckpointError, match=re.escape(problem)) as error:
        check_training_checkpoint(path)
    assert str(path) in str(error.value)


def test_training_checkpoint_must_be_a_dict_in_zip_format(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    content = torch.load(checkpoint, weights_only=False)
    data, weight = checkpoint.read_bytes(), next(iter(content['state_dict'].values())).numpy().tobytes()
    place = data.index(weight)
    path = tmp_path / 'x.pth'
    for save, problem in [
        (lambda: torch.save(content, path, _use_new_zipfile_serialization=False), f'{path} is in torch.* old format'),
        (lambda: save_file({'w': torch.ones(1)}, path), re.escape(f'{path} {ONLY}.') + '$'),
        (lambda: torch.save([1], path), f'{path} holds a list, but a checkpoint is a dict'),
        (lambda: path.write_bytes(data[:-9]), f'{path} .*cut off or damaged'),
        (lambda: path.write_bytes(data[:place] + b'x' + data[place + 1 :]), f'{path} .*cut off or damaged'),
        (path.unlink, f'no checkpoint .*{path}'),
    ]:
        save()
        with pytest.raises(CheckpointError, match=problem):
            check_training_checkpoint('~/x.pth')
    shutil.copy(checkpoint, path)
    assert check_training_checkpoint('~/x.pth') == content['meta']


class Custom:
    """A custom class."""


@pytest.mark.skipif(not hasattr(torch.serialization, 'safe_globals'), reason='of torch 2.5')
def test_classes_registered_by_name_are_accepted(checkpoint, tmp_path):
    path = with_values(tmp_path / 'x.pth', checkpoint, 'meta', custom=Custom())
    with pytest.raises(CheckpointError, match=rf'{__name__}\.Custom'):
        check_training_checkpoint(path)
    with torch.serialization.safe_globals([(Custom, f'{__name__}.Custom')]):
        assert check_training_checkpoint(path)['epoch'] == 1


def test_numbers_of_all_types_and_allowed_attributes_are_read(checkpoint, tmp_path):
    numbers = {code: np.array([1, 2], code) for code in 'bBhHiIlLqQefd?'}
    values = {**numbers, 'scalar': np.float64(1.5), 'mean': HistoryBuffer.mean}
    meta = read_training_checkpoint(with_values(tmp_path / 'x.pth', checkpoint, 'meta', **values))['meta']
    assert all(np.array_equal(meta[code], numbers[code]) for code in numbers)
    assert all(meta[code].dtype == numbers[code].dtype for code in numbers)
    assert (meta['scalar'], meta['mean']) == (1.5, HistoryBuffer.mean)


@pytest.mark.parametrize(('owner', 'name'), [(HistoryBuffer, 'changed'), (np.ndarray, 'changed')])
def test_training_checkpoint_cannot_change_classes(checkpoint, tmp_path, owner, name):
    path = with_values(tmp_path / 'x.pth', checkpoint, 'meta', custom=owner)
    with zipfile.ZipFile(path) as archive:
        records = {record: archive.read(record) for record in archive.namelist()}
    named = f'c{owner.__module__}\n{owner.__name__}\n'.encode()
    build = b'N}X\x07\x00\x00\x00changedK\x01s\x86b'  # BUILD with (None, {'changed': 1}), which sets attributes
    with zipfile.ZipFile(path, 'w') as archive:
        for record, data in records.items():
            if record.endswith('data.pkl'):
                place = data.rindex(named) + len(named)
                data = data[:place] + build + data[place:]
            archive.writestr(record, data)
    assert read_training_checkpoint(path)['meta']['custom'] is owner
    assert not hasattr(owner, name)
