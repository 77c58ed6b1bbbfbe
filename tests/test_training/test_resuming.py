import shutil

import pytest
import torch
from mmengine.config import Config
from recorded_training import train

from mmevm.checkpoints import CheckpointError, check_training_checkpoint, training_globals
from mmevm.training import last_whole_checkpoint, make_resumable, resume


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('trained')
    train(work_dir, options={'train_cfg.max_epochs': 1})
    return work_dir / 'epoch_1.pth'


def config(work_dir, **entries):
    return Config(dict(work_dir=str(work_dir), model=dict(type='Recorder'), train_cfg=dict(by_epoch=True), **entries))


@pytest.mark.parametrize(
    ('names', 'last'),
    [
        (['epoch_2', 'epoch_10', 'epoch_9'], 'epoch_10'),
        (['epoch_2', 'epoch_2_iter_50', 'epoch_2_iter_7'], 'epoch_2_iter_50'),
        (['epoch_3', 'epoch_2_iter_50'], 'epoch_3'),
        (['iter_900', 'iter_1000', 'best_coco_bbox_mAP_iter_9000'], 'iter_1000'),
        (['m4_step_5', 'm4_step_12'], 'm4_step_12'),  # a filename_tmpl of one's own
    ],
)
def test_the_last_one_is_found_by_its_numbers(checkpoint, tmp_path, names, last):
    for name in names:
        shutil.copy(checkpoint, tmp_path / f'{name}.pth')
    (tmp_path / 'last_checkpoint').write_text('')  # a process died while it wrote it
    path, meta = last_whole_checkpoint(tmp_path)
    assert path == tmp_path / f'{last}.pth'
    assert meta['epoch'] == 1


def test_a_damaged_one_is_named(checkpoint, tmp_path, capsys):
    shutil.copy(checkpoint, tmp_path / 'epoch_1.pth')
    (tmp_path / 'epoch_2.pth').write_bytes(checkpoint.read_bytes()[:-100])
    (tmp_path / 'epoch_3.pth').touch()
    path, _ = last_whole_checkpoint(tmp_path)
    assert path == tmp_path / 'epoch_1.pth'
    printed = capsys.readouterr().out
    for name in ('epoch_2.pth', 'epoch_3.pth'):
        assert str(tmp_path / name) in printed


def test_only_damaged_ones_are_an_error(tmp_path):
    """Beginning anew would write over what can perhaps be mended."""
    (tmp_path / 'epoch_2.pth').write_bytes(b'PK')
    with pytest.raises(CheckpointError, match=r'None of the checkpoints in .*epoch_2.pth'):
        resume(config(tmp_path, default_hooks=dict()))


def test_an_empty_folder_is_a_training_from_the_start(tmp_path, capsys):
    cfg = config(tmp_path, default_hooks=dict(), load_from='pretrained.pth')
    resume(cfg)
    assert 'the training starts anew' in capsys.readouterr().out
    assert cfg.load_from == 'mmevm://pretrained.pth'
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
        (dict(type='EpochBasedTrainLoop', max_epochs=1), 'mmevm.ResumableEpochLoop'),
        (dict(type='mine.Loop', max_epochs=1), 'mine.Loop'),
    ],
)
def test_mmengine_loops_become_resumable(tmp_path, train_cfg, loop):
    cfg = Config(dict(work_dir=str(tmp_path), train_cfg=train_cfg))
    make_resumable(cfg)
    assert cfg.train_cfg.type == loop
    assert 'by_epoch' not in cfg.train_cfg
    assert cfg.default_hooks.checkpoint.backend_args == dict(backend='mmevm.atomic')


def test_a_remote_folder_keeps_its_backend(tmp_path):
    hook = dict(type='CheckpointHook', out_dir='s3://bucket/runs')
    cfg = Config(dict(work_dir=str(tmp_path), train_cfg=dict(by_epoch=True), default_hooks=dict(checkpoint=hook)))
    make_resumable(cfg)
    assert 'backend_args' not in cfg.default_hooks.checkpoint


@pytest.mark.skipif(not hasattr(torch.serialization, 'safe_globals'), reason='torch < 2.5 reads all or nothing')
def test_what_is_saved_can_be_read_by_torch_alone(checkpoint):
    with torch.serialization.safe_globals(training_globals()):
        assert torch.load(checkpoint, weights_only=True)['meta']['iter'] == 6
