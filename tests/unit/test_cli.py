import argparse
import os
from pathlib import Path

import pytest
from mmengine.config import Config

from mmevm.checkpoints import CheckpointError
from mmevm.cli import add_common_arguments, load_config, read_config, replace_data_root, run
from mmevm.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / 'configs'
CONFIG = """
data_root = 'data/coco/'
train_dataloader = dict(batch_size=4, dataset=dict(data_root=data_root, ann_file='train.json'))
val_evaluator = dict(ann_file=data_root + 'val.json')
visualizer = dict(vis_backends=[dict(type='LocalVisBackend')])
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return the config that a command line with ``some_config.py`` results in."""
    monkeypatch.setenv('LOCAL_RANK', '0')  # so that monkeypatch restores it
    monkeypatch.delenv('LOCAL_RANK')
    path = tmp_path / 'some_config.py'

    def load(*words, text=CONFIG):
        path.write_text(text)
        parser = argparse.ArgumentParser()
        parser.add_argument('config')
        add_common_arguments(parser)
        return load_config(parser.parse_args([str(path), *words]))

    return load


def strings(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [string for item in value for string in strings(item)]
    return [value] if isinstance(value, str) else []


def test_config_without_arguments_is_unchanged(load):
    cfg = load()
    assert cfg.data_root == 'data/coco/'
    assert cfg.train_dataloader.dataset.ann_file == 'train.json'
    assert cfg.visualizer.vis_backends == [dict(type='LocalVisBackend')]
    assert cfg.launcher == 'none'


@pytest.mark.parametrize(
    ('words', 'text', 'expected'),
    [
        ([], CONFIG, 'work_dirs/some_config'),
        ([], CONFIG + "work_dir = 'mine'", 'mine'),
        (['--work-dir', 'yours'], CONFIG + "work_dir = 'mine'", 'yours'),
        (['--cfg-options', 'work_dir=theirs'], CONFIG + "work_dir = 'mine'", 'theirs'),
    ],
)
def test_work_dir(load, words, text, expected):
    assert load(*words, text=text).work_dir == expected


def test_cfg_options_override_other_arguments(load):
    options = ['data_root=there/', 'val_evaluator.ann_file=other.json', 'train_dataloader.batch_size=2', 'a.b=[1,2]']
    cfg = load('--data-root', 'here', '--cfg-options', *options)
    assert cfg.data_root == 'there/'
    assert cfg.val_evaluator.ann_file == 'other.json'
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.a.b == [1, 2]
    assert cfg.train_dataloader.dataset.data_root == 'here/'  # other keys are unchanged


def test_tensorboard_is_added_to_other_backends(load):
    backends = [dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]
    assert load('--tensorboard').visualizer.vis_backends == backends


@pytest.mark.parametrize('flag', ['--local-rank', '--local_rank'])
def test_local_rank_of_the_old_launcher(load, monkeypatch, flag):
    assert load('--launcher', 'pytorch', f'{flag}=3').launcher == 'pytorch'
    assert os.environ['LOCAL_RANK'] == '3'
    load(f'{flag}=5')
    assert os.environ['LOCAL_RANK'] == '3'  # the variable set by torchrun wins


def test_replace_data_root_in_a_stock_config():
    cfg = Config.fromfile(CONFIGS / 'maskrcnn_evm_m1.py')
    before = [string for string in strings(cfg.to_dict()) if string.startswith('data/')]
    assert len(before) > 5
    replaced = replace_data_root(cfg, '/elsewhere')
    expected = ['/elsewhere' + string.removeprefix('data/coco') for string in before]
    assert [string for string in strings(replaced.to_dict()) if string.startswith(('data/', '/elsewhere'))] == expected
    assert [string for string in strings(cfg.to_dict()) if string.startswith('data/')] == before  # not changed in place
    assert replaced.filename == cfg.filename


@pytest.mark.parametrize('old', ['data/coco', 'data/coco/'])
@pytest.mark.parametrize('new', ['/new', '/new/'])
def test_replace_data_root_changes_only_paths_below_it(old, new):
    cfg = Config(
        dict(
            data_root=old,
            root='data/coco',
            nested=dict(paths=['data/coco/a', ('data/coco/b/', 1, None)]),
            others=['data/coco_semi/a', 'other/data/coco/', 'mmevm.EfficientViM', True, 0.5],
        )
    )
    replaced = replace_data_root(cfg, new).to_dict()
    assert replaced == dict(
        data_root='/new/',
        root='/new/',
        nested=dict(paths=['/new/a', ('/new/b/', 1, None)]),
        others=['data/coco_semi/a', 'other/data/coco/', 'mmevm.EfficientViM', True, 0.5],
    )


@pytest.mark.parametrize(
    ('data_root', 'expected'), [('~/coco', '/home/me/coco/x'), ('s3://bucket/coco', 's3://bucket/coco/x'), ('.', './x')]
)
def test_replace_data_root_with_home_folder_and_url(monkeypatch, data_root, expected):
    monkeypatch.setenv('HOME', '/home/me')
    assert replace_data_root(Config(dict(data_root='data/', path='data/x')), data_root).path == expected


@pytest.mark.parametrize('entries', [dict(), dict(data_root=None), dict(data_root='')])
def test_replace_data_root_requires_data_root(entries):
    with pytest.raises(ConfigError, match='the config has no data_root'):
        replace_data_root(Config(dict(entries, path='data/x')), '/new')


@pytest.mark.parametrize('kind', [ConfigError, CheckpointError])
def test_run_prints_only_the_message_of_user_errors(kind):
    def fail():
        raise kind('What is wrong and what to do.')

    with pytest.raises(SystemExit) as stop:
        run(fail)
    assert stop.value.code == f'{kind.__name__}: What is wrong and what to do.'  # printed by Python, with status 1


@pytest.mark.parametrize('kind', [RuntimeError, ValueError, KeyError, KeyboardInterrupt])
def test_run_does_not_catch_other_errors(kind):
    def fail():
        raise kind('unexpected')

    with pytest.raises(kind, match='unexpected'):
        run(fail)


def test_run_runs():
    called = []
    run(lambda: called.append(True))
    assert called == [True]


@pytest.mark.parametrize('path', ['nowhere.py', 'mmdet::nowhere.py', 'nothing::of_the_kind.py', 'data.csv'])
def test_unreadable_config(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data.csv').touch()
    with pytest.raises(ConfigError, match=f'^{path} cannot be read: .* Give the path of a config file'):
        read_config(path)


def test_mmpretrain_loader_defaults(load):
    text = """
default_scope = 'mmpretrain'
train_dataloader = dict(num_workers=4)
val_dataloader = dict(num_workers=0)
test_dataloader = dict(num_workers=4, persistent_workers=False, collate_fn=dict(type='pseudo_collate'))
"""
    cfg = load(text=text)
    assert cfg.train_dataloader.collate_fn == cfg.val_dataloader.collate_fn == dict(type='default_collate')
    assert cfg.test_dataloader.collate_fn == dict(type='pseudo_collate')
    workers = [cfg[f'{split}_dataloader'].persistent_workers for split in ('train', 'val', 'test')]
    assert workers == [True, False, False]
    assert (
        load('--cfg-options', 'train_dataloader.num_workers=0', text=text).train_dataloader.persistent_workers is False
    )
    assert 'collate_fn' not in load().train_dataloader


def test_replace_data_root_without_matching_paths():
    cfg = Config(dict(data_root='data/coco', train_dataloader=dict(dataset=dict(data_root='/data/coco'))))
    with pytest.raises(ConfigError, match=r'^--data-root /new: no path of the config begins with'):
        replace_data_root(cfg, '/new')


def test_missing_config_is_named_with_its_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as error:
        read_config('configs/none.py')
    assert f'({tmp_path}/configs/none.py; the current folder is {tmp_path})' in str(error.value)
