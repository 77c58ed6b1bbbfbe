"""Trainings that are killed at any moment and resumed: separate processes, small images, on CPU."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from command_line import ENVIRONMENT, ROOT, error_line, run, succeed
from tool_server import Tool

from mmevm.engine.training_state import check_training_checkpoint

SHAPES = ROOT / 'configs/demo/maskrcnn_evm_m1_shapes.py'
DIGITS = ROOT / 'configs/demo/efficientvim-m1_digits.py'
SEED = ['randomness.seed=0', 'randomness.deterministic=True']

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


class Training:
    """A running tools/train.py, whose output is read."""

    def __init__(self, config, *arguments, cwd):
        self.log = cwd / 'log.txt'
        self.log.write_text('')
        tool = [ROOT / 'tools/train.py', config, '--work-dir', 'here', *arguments]
        self.process = Tool(*tool, cwd=cwd, env=os.environ | ENVIRONMENT, stdout=self.log, stderr=self.log)

    @property
    def printed(self):
        return self.log.read_text()

    def wait_for(self, condition):
        while not condition():
            assert self.process.poll() is None, self.printed
            time.sleep(0.001)

    def end(self, number=None):
        if number:
            os.killpg(self.process.pid, number)  # its loaders' workers too, as a cluster does
        self.process.wait(300)
        return self.printed


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp('shapes')
    succeed(ROOT / 'tools/make_shapes.py', root, '--num-train', 8, '--num-val', 4, '--size', 96, cwd=root)
    return root


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """Four images of each digit."""
    root = tmp_path_factory.mktemp('digits')
    succeed(ROOT / 'tools/make_digits.py', root, cwd=root)
    for folder in root.glob('*/*'):
        for path in sorted(folder.iterdir())[4:]:
            path.unlink()
    return root


def detection(shapes, *options):
    """Twenty iterations, a checkpoint after every second one, an evaluation after eight."""
    return [
        *(SHAPES, '--data-root', shapes, '--cfg-options', *SEED, 'train_cfg.max_iters=20', 'train_cfg.val_interval=8'),
        *('train_dataloader.batch_size=2', 'default_hooks.checkpoint.interval=2', 'default_hooks.logger.interval=1'),
        *('param_scheduler.0.end=5', 'param_scheduler.1.begin=5', 'param_scheduler.1.end=20', *options),
    ]


def classification(digits, *options):
    """Four epochs of five iterations with mixup, the model's average and MESA, images loaded by two workers."""
    return [
        *(DIGITS, '--data-root', digits, '--cfg-options', *SEED, 'train_cfg.max_epochs=4', 'train_cfg.val_interval=2'),
        *('train_dataloader.batch_size=8', 'train_dataloader.num_workers=2', 'default_hooks.logger.interval=1'),
        *('val_dataloader.batch_size=4', 'val_dataloader.num_workers=2'),
        *('default_hooks.checkpoint.interval=1', 'train_dataloader.persistent_workers=True', *options),
    ]


def saved_iterations(folder):
    """Return the iterations of the checkpoints, all of which must be valid."""
    return sorted(check_training_checkpoint(path)['iter'] for path in folder.glob('*.pth'))


def assert_same_state(path, other):
    """Compare weights, averages, optimizer and schedules bit for bit."""
    first, second = (torch.load(path, map_location='cpu', weights_only=False) for path in (path, other))
    assert first.keys() == second.keys()
    for part in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers'):
        left, right = (torch.utils._pytree.tree_flatten(content.get(part)) for content in (first, second))
        assert left[1] == right[1], part
        for a, b in zip(left[0], right[0], strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, part


@pytest.fixture(scope='module')
def uninterrupted(shapes, tmp_path_factory):
    cwd = tmp_path_factory.mktemp('uninterrupted')
    printed = Training(*detection(shapes), cwd=cwd).end()
    assert 'Iter(train) [20/20]' in printed, printed
    return cwd / 'here'


def test_training_killed_seven_times_equals_an_uninterrupted_one(shapes, uninterrupted, tmp_path):
    here = tmp_path / 'here'
    saved = cut_off = 0

    def is_printed(text):
        return lambda training: text in training.printed

    def is_being_written(number):
        return lambda _: (here / f'iter_{number}.pth.part').exists()

    def is_written(number):
        return lambda _: (here / f'iter_{number}.pth').exists()

    moments = [
        is_printed('Checkpoints will be saved to'),  # no checkpoint yet
        is_being_written(2),
        is_written(4),  # before mmengine writes last_checkpoint
        is_printed('Iter(val) [1/4]'),
        is_printed('Load checkpoint from'),
        is_being_written(14),
        is_being_written(20),
    ]
    for moment in moments:
        training = Training(*detection(shapes), '--resume', cwd=tmp_path)
        training.wait_for(lambda: moment(training))  # noqa: B023
        printed = training.end(signal.SIGKILL)
        assert training.process.returncode == -signal.SIGKILL
        expected = f'resumed epoch: 0, iter: {saved}\n' if saved else 'the training starts from the beginning'
        assert expected in printed or moment is moments[4]
        cut_off += len(list(here.glob('*.part')))
        complete = saved_iterations(here)
        assert not complete or complete[-1] >= saved
        saved = complete[-1] if complete else 0
    assert saved >= 18

    printed = Training(*detection(shapes), '--resume', cwd=tmp_path).end()
    assert f'resumed epoch: 0, iter: {saved}\n' in printed
    assert not list(here.glob('*.part'))
    assert_same_state(here / 'iter_20.pth', uninterrupted / 'iter_20.pth')


def damage(path):
    """Cut off a file, as after a power failure without sync."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_resume_skips_a_damaged_checkpoint(shapes, uninterrupted, tmp_path):
    here = tmp_path / 'here'
    shutil.copytree(uninterrupted, here)
    damage(here / 'iter_20.pth')
    printed = Training(*detection(shapes), '--resume', cwd=tmp_path).end()
    assert 'here/iter_20.pth is cut off or damaged' in printed
    assert 'resumed epoch: 0, iter: 18\n' in printed
    assert_same_state(here / 'iter_20.pth', uninterrupted / 'iter_20.pth')

    damage(here / 'iter_18.pth')
    damage(here / 'iter_20.pth')
    result = run(ROOT / 'tools/train.py', *detection(shapes), '--resume', '--work-dir', here, cwd=tmp_path)
    assert f'None of the checkpoints in {here} can be resumed from' in error_line(result)


def test_full_disk_is_an_error_and_keeps_earlier_checkpoints(shapes, uninterrupted, tmp_path):
    """The file system has room for two and a half checkpoints."""
    size = (uninterrupted / 'iter_20.pth').stat().st_size * 5 // 2
    options = detection(shapes, 'default_hooks.checkpoint.max_keep_ckpts=-1')
    script = f'mount -t tmpfs -o size={size} none here || exit 77; "$@"; status=$?; cp here/iter* saved; exit $status'
    for name in ('here', 'saved'):
        (tmp_path / name).mkdir()
    command = ['unshare', '--map-root-user', '--mount', 'sh', '-c', script, 'sh', sys.executable]
    command += [ROOT / 'tools/train.py', '--work-dir', 'here', *options]
    environment = os.environ | ENVIRONMENT
    result = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    if result.returncode == 77 or 'unshare' in result.stderr:
        pytest.skip(f'this user may not mount a file system: {result.stderr}')
    assert 'here/iter_6.pth cannot be written (No space left on device)' in error_line(result)
    assert sorted(path.name for path in (tmp_path / 'saved').iterdir()) == ['iter_2.pth', 'iter_4.pth']
    assert saved_iterations(tmp_path / 'saved') == [2, 4]


def test_sigterm_saves_and_resume_continues_within_the_epoch(digits, tmp_path):
    """With mixup, MESA, EMA and two loader workers; the second SIGTERM is during an evaluation."""
    (tmp_path / 'uninterrupted').mkdir()
    printed = Training(*classification(digits), cwd=tmp_path / 'uninterrupted').end()
    assert 'Epoch(train) [4][5/5]' in printed, printed

    for moment in ('Epoch(train) [2][2/5]', 'Epoch(val) [2]', 'Epoch(train) [4][4/5]'):
        training = Training(*classification(digits), '--resume', cwd=tmp_path)
        training.wait_for(lambda: moment in training.printed)  # noqa: B023
        printed = training.end(signal.SIGTERM)
        assert training.process.returncode == 143
        assert 'Traceback' not in printed
        assert 'repeat the command with --resume to continue' in printed
    printed = Training(*classification(digits), '--resume', cwd=tmp_path).end()
    assert ' of 5 batches of this epoch.' in printed
    assert_same_state(tmp_path / 'here/epoch_4.pth', tmp_path / 'uninterrupted/here/epoch_4.pth')
