import os

import pytest
from command_line import ROOT, run
from recorded_training import EPOCHS, LENGTH, PER_EPOCH, train

# Sent by another process, as a cluster does.
TERMINATE = "subprocess.run(['kill', *(str(process.pid) for process in children)], check=True); time.sleep(0.5)"


def images(seen):
    return [int(sample[0]) for batch, _ in seen for sample in batch]


def augmentations(seen):
    return [number for batch, _ in seen for sample in batch for number in sample[1:]]


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('by_epoch', [True, False])
def test_epoch_has_each_image_once_and_no_random_number_twice(tmp_path, by_epoch, workers):
    seen = train(tmp_path, by_epoch, workers)
    assert len(seen) == EPOCHS * PER_EPOCH
    for epoch in range(EPOCHS):
        assert sorted(images(seen[epoch * PER_EPOCH : (epoch + 1) * PER_EPOCH])) == list(range(LENGTH))
    drawn = augmentations(seen) + [number for _, numbers in seen for number in numbers]
    assert len(set(drawn)) == len(drawn)


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('by_epoch', [True, False])
def test_resumed_iterations_equal_an_uninterrupted_run(tmp_path, by_epoch, workers):
    options = {'default_hooks.checkpoint.interval': 1 if by_epoch else PER_EPOCH}
    uninterrupted = train(tmp_path / 'uninterrupted', by_epoch, workers, options=options)
    first = tmp_path / 'uninterrupted' / ('epoch_1.pth' if by_epoch else f'iter_{PER_EPOCH}.pth')
    rest = train(tmp_path / 'rest', by_epoch, workers, checkpoint=first)
    assert images(rest) == images(uninterrupted)[LENGTH:]
    assert [numbers for _, numbers in rest] == [numbers for _, numbers in uninterrupted][PER_EPOCH:]
    if by_epoch or not workers:
        assert augmentations(rest) == augmentations(uninterrupted[PER_EPOCH:])
    else:
        assert not set(augmentations(rest)) & set(
            augmentations(uninterrupted[:PER_EPOCH])
        )  # at least not those of the start


def test_seed_determines_images_and_augmentation(tmp_path):
    first, again, other = (
        train(tmp_path / name, options={'randomness.seed': seed, 'train_cfg.max_epochs': 1})
        for name, seed in dict(first=0, again=0, other=1).items()
    )
    assert first == again
    assert images(first) != images(other)
    assert not set(augmentations(first)) & set(augmentations(other))


@pytest.mark.slow
@pytest.mark.parametrize('terminate', ['', '[os.kill(process.pid, 15) for process in children]', TERMINATE])
@pytest.mark.parametrize('by_epoch', [True, False])
def test_error_ends_the_workers_too(tmp_path, terminate, by_epoch):
    """Workers wait for work when the process fails, and may have received SIGTERM before."""
    code = (
        'import os, subprocess, time\n'
        'from recorded_training import runner\n'
        f'run = runner({str(tmp_path)!r}, by_epoch={by_epoch}, workers=2)\n'
        'def fail(*args, **kwargs):\n'
        '    import multiprocessing\n'
        '    children = multiprocessing.active_children()\n'
        f'    {terminate}\n'
        "    raise ValueError('the fault of this test')\n"
        'run.model.train_step = fail\n'
        'run.train()\n'
    )
    result = run('-c', code, cwd=tmp_path, PYTHONPATH=f'{ROOT}{os.pathsep}{ROOT}/tests/helpers')
    assert result.returncode == 1
    assert 'the fault of this test' in result.stderr
