"""Trainings and evaluations in several processes started by torchrun, on CPU."""

import json
import os
import pickle
import socket
import subprocess
import sys
import time

import pytest
import torch
from command_line import ENVIRONMENT, ROOT, scalars, succeed
from pycocotools.coco import COCO

SHAPES = ROOT / 'configs/demo/maskrcnn_evm_m1_shapes.py'
DIGITS = ROOT / 'configs/demo/efficientvim-m1_digits.py'
TRAIN, TEST = ROOT / 'tools/train.py', ROOT / 'tools/test.py'
NUM_SHAPES, NUM_DIGITS = 5, 13  # to evaluate on: no multiples of 2 or 4
SEED = ['randomness.seed=0', 'randomness.deterministic=True']

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1200)]


def torchrun(count, *arguments, cwd, options=('--standalone',), start=subprocess.run):
    """Run a command by torchrun; return its result with the output of all processes."""
    command = [sys.executable, '-m', 'torch.distributed.run', *options, '--nproc-per-node', count, *arguments]
    paths = dict(PYTHONPATH=os.pathsep.join([ENVIRONMENT['PYTHONPATH'], str(ROOT / 'tests/helpers')]))
    if start is subprocess.run:
        start = lambda *args, **kwargs: subprocess.run(*args, timeout=600, check=False, **kwargs)
    return start(
        list(map(str, command)),
        cwd=cwd,
        env=os.environ | ENVIRONMENT | paths,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a test may kill all processes of the command
    )


def checkpoint(path):
    return torch.load(path, map_location='cpu', weights_only=False)


# ----------------------------------------------------------------------------------------------------------------------
# The demos


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp('data')
    numbers = ['--num-train', 8, '--num-val', NUM_SHAPES, '--size', 64]
    succeed(ROOT / 'tools/make_shapes.py', 'shapes', *numbers, cwd=root)
    succeed(ROOT / 'tools/make_digits.py', 'digits', cwd=root)
    for folder in (root / 'digits/train').iterdir():
        for path in sorted(folder.iterdir())[4:]:
            path.unlink()
    paths = sorted((root / 'digits/val').glob('*/*'), key=lambda path: path.name)
    for path in paths[NUM_DIGITS:]:
        path.unlink()
    return root


def demo(folder, base):
    """Write a config of a demo with images of 64 pixels that saves checksums of each process's weights."""
    path = folder / 'config.py'
    scale = dict(scale=(64, 64)) if base == SHAPES else dict(scale=32)
    at, batch = (2, 2) if base == SHAPES else (1, 5)  # more than one: BatchNorm needs them
    path.write_text(f"""
_base_ = '{base}'
custom_imports = dict(imports=['process_hooks'])
custom_hooks = [*_base_.get('custom_hooks', []), dict(type='WeightsHook')]
train_pipeline = _base_.train_pipeline
train_pipeline[{at}].update({scale})
test_pipeline = _base_.test_pipeline
test_pipeline[1].update({scale})
train_dataloader = dict(batch_size={batch}, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
default_hooks = dict(logger=dict(interval=1))
param_scheduler = []
""")
    return path


def train_demo(count, base, data, cwd):
    name = 'shapes' if base == SHAPES else 'digits'
    unit = 'iters' if base == SHAPES else 'epochs'
    length = 2 if base == SHAPES else 1
    flags = ['--launcher', 'pytorch', '--data-root', data / name, '--work-dir', 'here', '--auto-scale-lr']
    options = [*SEED, f'train_cfg.max_{unit}={length}', f'train_cfg.val_interval={length}']
    result = torchrun(count, TRAIN, demo(cwd, base), *flags, '--cfg-options', *options, cwd=cwd)
    assert result.returncode == 0, result.stdout
    return cwd / 'here'


@pytest.fixture(scope='module')
def detector(data, tmp_path_factory):
    """Train in two processes."""
    return train_demo(2, SHAPES, data, tmp_path_factory.mktemp('detector'))


@pytest.fixture(scope='module')
def classifier(data, tmp_path_factory):
    return train_demo(4, DIGITS, data, tmp_path_factory.mktemp('classifier'))


def assert_trained(work_dir, count, lr, metric):
    steps, (evaluation,) = scalars(work_dir)
    assert [step['lr'] for step in steps] == pytest.approx([lr] * len(steps))
    assert metric in evaluation
    weights = {(work_dir / f'weights_of_{rank}').read_text() for rank in range(count)}
    assert len(list(work_dir.glob('weights_of_*'))) == count
    assert len(weights) == 1
    return steps, evaluation


def test_detectors_train(detector):
    steps, _ = assert_trained(detector, 2, 7e-4 * 2 * 2 / 16, 'coco/segm_mAP')
    assert [step['step'] for step in steps] == [1, 2]


def test_classifiers_train_with_mesa(classifier):
    steps, evaluation = assert_trained(classifier, 4, 1e-3 * 5 * 4 / 2048, 'accuracy/top1')
    assert len(steps) == 2  # of 40 images
    assert 'loss_mesa' in steps[-1]
    right = evaluation['accuracy/top1'] * NUM_DIGITS / 100
    assert right == pytest.approx(round(right), abs=1e-3)  # each image counts once


def test_evaluation_gathers_each_image_once(data, detector, tmp_path):
    config = demo(tmp_path, SHAPES)
    flags = [detector / 'iter_2.pth', '--data-root', data / 'shapes', '--work-dir']
    options = ['--cfg-options', 'model.test_cfg.rcnn.score_thr=0']  # finds objects
    found = {}
    for name, start in dict(one=succeed, two=lambda *args, cwd: torchrun(2, *args, cwd=cwd)).items():
        launcher = ['--launcher', 'pytorch'] if name == 'two' else []
        env = dict(PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / 'tests/helpers')])) if name == 'one' else {}
        start(TEST, config, *flags, name, '--out', f'{name}.pkl', *launcher, *options, cwd=tmp_path, **env)
        results = pickle.loads((tmp_path / f'{name}.pkl').read_bytes())
        # mmengine's LoggerHook writes it in each process: there may be bytes of another process after the end.
        metrics, _ = json.JSONDecoder().raw_decode(next((tmp_path / name).glob('*/*.json')).read_text())
        found[name] = results, {key: value for key, value in metrics.items() if key.startswith('coco/')}
    images = sorted(COCO(data / 'shapes/annotations/instances_val.json').imgs)
    assert len(images) == NUM_SHAPES
    for results, metrics in found.values():
        assert [result['img_id'] for result in results] == images
        assert len(metrics) == 12
    assert found['one'][1] == found['two'][1]
    assert max(found['one'][1].values()) > 0
    for one, two in zip(found['one'][0], found['two'][0], strict=True):
        for key in ('bboxes', 'scores', 'labels'):
            assert torch.equal(one['pred_instances'][key], two['pred_instances'][key])


# ----------------------------------------------------------------------------------------------------------------------
# Gradients


@pytest.fixture(scope='module')
def gradients(tmp_path_factory):
    """Run tests/helpers/gradients.py, which compares the gradients of two processes with those of one."""
    cwd = tmp_path_factory.mktemp('gradients')
    result = torchrun(2, ROOT / 'tests/helpers/gradients.py', cwd / 'found.json', cwd=cwd)
    assert result.returncode == 0, result.stdout
    found = json.loads((cwd / 'found.json').read_text())
    assert all(case['same'] for case in found.values())
    assert all(case['first'] > 1e-2 for case in found.values())  # the other processes matter
    return found


@pytest.mark.parametrize('case', ['mesa', 'distillation', 'atss'])
def test_gradients_equal_those_of_the_joined_batch(gradients, case):
    assert gradients[case]['joined'] < 1e-6
    assert gradients[case]['statistics'] == 0


@pytest.mark.parametrize('case', ['retinanet', 'mask_rcnn'])
def test_losses_normalized_per_process_give_the_mean_of_the_gradients(gradients, case):
    """RetinaNet divides by the boxes of each process; Mask R-CNN samples RoIs in each process."""
    assert gradients[case]['parts'] < 1e-6
    assert gradients[case]['joined'] > 1e-3


def test_synchronized_batch_norm_equals_that_of_the_joined_batch(gradients):
    """mmcv's computes in float32; small maps in training mode magnify its rounding."""
    assert gradients['sync_bn']['statistics'] < 0.05
    assert gradients['sync_bn']['joined'] < 0.02
    assert gradients['sync_bn']['parts'] > 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Faults, in trainings of a tiny model

LENGTH = 24  # iterations, six an epoch of two processes

TINY = """
custom_imports = dict(imports=['recorded_training', 'process_hooks'])
loader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='Augmented'),
)
model = dict(type='Recorder')
train_dataloader = loader
train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=4)
val_dataloader = loader
val_cfg = dict()
val_evaluator = dict(type='Nothing')
optim_wrapper = dict(optimizer=dict(type='SGD', lr=1e-3, momentum=0.9))
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1), logger=dict(type='LoggerHook', interval=1))
custom_hooks = [dict(type='FaultHook'), dict(type='WeightsHook')]
auto_scale_lr = dict(base_batch_size=16)
randomness = dict(seed=0)
"""


def tiny(cwd, *flags, count=2, text=TINY, options=('--standalone',), start=subprocess.run, **fault):
    (cwd / 'config.py').write_text(text)
    changes = [f'custom_hooks.0.{key}={value}' for key, value in fault.items()]
    flags = ['--launcher', 'pytorch', *flags, *(['--cfg-options', *changes] if changes else [])]
    return torchrun(count, TRAIN, 'config.py', '--work-dir', 'here', *flags, cwd=cwd, options=options, start=start)


def assert_ended_soon(result, cwd, *words, section='Root Cause'):
    assert result.returncode == 1
    assert time.time() - float((cwd / 'here/fault_time').read_text()) < 60
    summary = result.stdout[result.stdout.rindex(section) :]
    for word in words:
        assert word in summary


def test_error_of_one_process_ends_all_and_is_printed_last(tmp_path):
    result = tiny(tmp_path, fault='error')
    assert_ended_soon(result, tmp_path, 'rank      : 1', 'ValueError: the fault of this test')


def test_killed_process_ends_all(tmp_path):
    # The root cause may be the error of process 0, which notices the lost connection before torchrun does the signal.
    words = 'rank      : 1', 'Signal 9 (SIGKILL) received'
    assert_ended_soon(tiny(tmp_path, fault='killed'), tmp_path, *words, section='Failures:')


def test_process_that_exits_during_evaluation_ends_all(tmp_path):
    result = tiny(tmp_path, fault='exit', rank=0, evaluating=True)
    assert_ended_soon(result, tmp_path, 'rank      : 0', 'exitcode  : 77')


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    cwd = tmp_path_factory.mktemp('uninterrupted')
    result = tiny(cwd)
    assert result.returncode == 0, result.stdout
    return checkpoint(cwd / 'here/epoch_4.pth')


def test_killed_and_terminated_trainings_equal_an_uninterrupted_one(uninterrupted, tmp_path):
    here = tmp_path / 'here'
    result = tiny(tmp_path, fault='all_killed', at=8)
    assert result.returncode == -9
    assert sorted(path.name for path in here.glob('*.pth')) == ['epoch_1.pth']

    # PreemptionHook all-reduces the flag every ten iterations.
    result = tiny(tmp_path, '--resume', fault='terminated', at=14)
    assert result.returncode == 1
    assert 'got signal: 15' in result.stdout
    assert f'the training ends after 20 of {LENGTH} iterations' in result.stdout
    assert sorted(path.name for path in here.glob('*.pth')) == [
        *('epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth', 'epoch_3_iter_20.pth')
    ]

    result = tiny(tmp_path, '--resume')
    assert result.returncode == 0, result.stdout
    assert 'resumed epoch: 3, iter: 20' in result.stdout
    saved = checkpoint(here / 'epoch_4.pth')
    assert saved['meta']['iter'] == LENGTH
    assert torch.equal(saved['state_dict']['weight'], uninterrupted['state_dict']['weight'])
    assert str(saved['optimizer']) == str(uninterrupted['optimizer'])


def evaluated(images):
    """Return the tiny config with evaluations every two epochs, on images that are not divided equally."""
    return (
        TINY
        + f"""
train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=2)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
    dataset=dict(type='Augmented', length={images}),
)
"""
    )


@pytest.mark.parametrize('images', [1, 19])
def test_processes_with_different_numbers_of_batches_evaluate(tmp_path, images):
    """No process may all-reduce while others gather. With 1 image, one process has no batch."""
    result = tiny(tmp_path, text=evaluated(images))
    assert result.returncode == 0, result.stdout
    assert result.stdout.count('nothing: 0') == 2


@pytest.mark.parametrize(('images', 'batch'), [(19, None), (19, 2), (39, 2)])
def test_sigterm_during_evaluation_ends_all_processes(tmp_path, images, batch):
    """They all-reduce at its start, at its end, and after the tenth batch if all have as many."""
    fault = dict(fault='terminated', rank=0, evaluating=True, batch=batch)
    result = tiny(tmp_path, text=evaluated(images), **fault)
    is_complete = batch is not None and images < 20
    assert ('nothing: 0' in result.stdout) == is_complete
    assert 'got signal: 15' in result.stdout
    assert f'the training ends after 12 of {LENGTH} iterations' in result.stdout
    meta = checkpoint(tmp_path / 'here/epoch_2_iter_12.pth')['meta']
    assert (meta['epoch'], meta['iter'], meta['trained']) == (2, 12, 0)
    result = tiny(tmp_path, '--resume', text=evaluated(images))
    assert result.returncode == 0, result.stdout
    assert 'resumed epoch: 2, iter: 12' in result.stdout


def test_resume_with_another_number_of_processes_restarts_the_epoch(tmp_path):
    tiny(tmp_path, '--auto-scale-lr', fault='terminated', at=14)
    result = tiny(tmp_path, '--auto-scale-lr', '--resume', count=3)
    assert result.returncode == 0, result.stdout
    assert 'The checkpoint is from epoch 4, after 2 of 6 batches, but an epoch now has 4' in result.stdout
    steps, _ = scalars(tmp_path / 'here')
    assert [step['step'] for step in steps] == [21, 22, 23, 24]
    assert {step['lr'] for step in steps} == {1e-3 * 2 / 16}  # as at the start of the training


def test_torchrun_without_launcher_is_an_error(tmp_path):
    result = tiny(tmp_path, '--launcher', 'none')
    assert result.returncode == 1
    assert 'torchrun started 2 processes' in result.stdout
    assert 'Add --launcher pytorch' in result.stdout
    assert not (tmp_path / 'here').exists()


def test_run_names_may_differ(tmp_path):
    """A name may contain the time."""
    text = TINY + 'import time\nvisualizer = dict(type="Visualizer", name=f"run_{time.time_ns()}")\ndel time\n'
    result = tiny(tmp_path, text=text)
    assert result.returncode == 0, result.stdout


# ----------------------------------------------------------------------------------------------------------------------
# Nodes: one torchrun each


def nodes(tmp_path, *flags, text=TINY, **fault):
    """Start two torchruns, each in its own folder, and return their outputs and exit statuses."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    rendezvous = ['--nnodes', 2, '--rdzv-backend', 'c10d', '--rdzv-endpoint', f'localhost:{port}', '--rdzv-id', 'test']
    running = []
    for name in ('first', 'second'):
        (tmp_path / name).mkdir(exist_ok=True)
        running.append(
            tiny(tmp_path / name, *flags, count=1, text=text, options=rendezvous, start=subprocess.Popen, **fault)
        )
    return [(process.communicate(timeout=600)[0], process.returncode) for process in running]


def test_two_nodes_equal_one(uninterrupted, tmp_path):
    # The results of an evaluation are gathered in a folder that they share.
    text = TINY + ''.join(f'{key} = None\n' for key in ('val_dataloader', 'val_cfg', 'val_evaluator'))
    for printed, status in nodes(tmp_path, text=text):
        assert status == 0, printed
    (path,) = tmp_path.glob('*/here/epoch_4.pth')
    assert torch.equal(checkpoint(path)['state_dict']['weight'], uninterrupted['state_dict']['weight'])

    for printed, status in nodes(tmp_path, '--resume', text=text):  # the second node has no checkpoint
        assert status == 1
        assert 'Process 1 has another config than process 0: load_from is ' in printed
        assert 'a shared work_dir' in printed


def test_killed_process_ends_the_other_node(tmp_path):
    for printed, status in nodes(tmp_path, fault='killed'):
        assert status == 1, printed
    (path,) = tmp_path.glob('*/here/fault_time')
    assert time.time() - float(path.read_text()) < 60
