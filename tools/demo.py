"""Make a small data set, train EfficientViM-M1 on it from random weights, evaluate, and draw what it finds.

``detection`` trains Mask R-CNN on synthetic shapes, some eight minutes on two CPU cores. ``classification`` trains on
handwritten digits, some six minutes, and starts a Mask R-CNN from the weights. Each step is a command that
is shown, and that works the same for other configs.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

SHAPES = 'configs/demo/maskrcnn_evm_m1_shapes.py'
DIGITS = 'configs/demo/efficientvim-m1_digits.py'


def run(*command: str) -> None:
    print('\n$ python', *command, flush=True)
    subprocess.run([sys.executable, *command], check=True)


def train_and_test(config: str, data: Path, work_dir: Path, options: list[str]) -> str:
    """Everything between the data and the pictures; the checkpoint that the training leaves."""
    training = work_dir / 'training'
    run('tools/train.py', config, '--data-root', str(data), '--work-dir', str(training), *options)
    checkpoint = (training / 'last_checkpoint').read_text()
    run(
        *('tools/test.py', config, checkpoint, '--data-root', str(data)),
        *('--work-dir', str(work_dir / 'test'), '--show-dir', str(work_dir / 'pictures')),
    )
    run('tools/plot_training.py', str(training), str(work_dir / 'training.png'))
    return checkpoint


def detect(work_dir: Path, options: list[str]) -> None:
    data = work_dir / 'shapes'
    run('tools/make_shapes.py', str(data))
    checkpoint = train_and_test(SHAPES, data, work_dir, options)
    print(f'\nGround truth (left) beside detections (right): {work_dir}/pictures/*.png')
    print(f'Losses and AP: {work_dir}/training.png')
    print(f'Checkpoint: {checkpoint}')


def classify(work_dir: Path, options: list[str]) -> None:
    data, shapes = work_dir / 'digits', work_dir / 'shapes'
    run('tools/make_digits.py', str(data))
    checkpoint = train_and_test(DIGITS, data, work_dir, options)
    # What a classifier has learnt starts a detector: here for a few iterations, to show the way.
    run('tools/make_shapes.py', str(shapes), '--num-train', '16', '--num-val', '4')
    run(
        *('tools/train.py', SHAPES, '--data-root', str(shapes), '--work-dir', str(work_dir / 'detector')),
        *('--cfg-options', 'train_cfg.max_iters=4', 'train_cfg.val_interval=4', 'default_hooks.logger.interval=1'),
        *('model.backbone.init_cfg._delete_=True', 'model.backbone.init_cfg.type=Pretrained'),  # there is a None there
        f'model.backbone.init_cfg.checkpoint={checkpoint}',
    )
    print(f'\nPredictions: {work_dir}/pictures/')
    print(f'Losses and accuracy: {work_dir}/training.png')
    print(f'Checkpoint: {checkpoint}')


TASKS = dict(detection=detect, classification=classify)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('task', nargs='?', choices=TASKS, default='detection', help='(default: detection)')
    parser.add_argument('--work-dir', type=Path, help='where everything goes (default: work_dirs/demo-TASK)')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='handed on to the training')
    args = parser.parse_args()

    work_dir = args.work_dir or Path('work_dirs', f'demo-{args.task}')
    if (work_dir / 'shapes').exists() or (work_dir / 'digits').exists():  # what an earlier demo has left, nobody else
        for old in ('training', 'pictures', 'detector'):
            shutil.rmtree(work_dir / old, ignore_errors=True)
    TASKS[args.task](work_dir, ['--cfg-options', *args.cfg_options] if args.cfg_options else [])


if __name__ == '__main__':
    main()
