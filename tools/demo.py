"""Train EfficientViM-M1 on a small dataset from random weights, evaluate it and draw its predictions.

``detection`` trains Mask R-CNN on synthetic shapes (about eight minutes on two CPU cores). ``photos`` downloads BCCD,
photographs of blood cells, and trains RTMDet on it (about nine minutes). ``classification`` trains a classifier on
handwritten digits (about six minutes) and starts a Mask R-CNN from its weights. ``segmentation`` trains a segmentor on
synthetic shapes of three classes. The demo prints the command of each step; the same commands work
with other configs.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

SHAPES = 'configs/demo/maskrcnn_evm_m1_shapes.py'
PHOTOS = 'configs/demo/rtmdet_evm_m1_photos.py'
DIGITS = 'configs/demo/efficientvim-m1_digits.py'
LABELS = 'configs/demo/fpn-s8_evm_m1_shapes.py'


def run(*command: str) -> None:
    print('\n$ python', *command, flush=True)
    if status := subprocess.run([sys.executable, *command], check=False).returncode:
        sys.exit(status)  # the command has said why


def train_and_test(config: str, data: Path, work_dir: Path, options: list[str]) -> str:
    """Train, evaluate, draw predictions and plot losses. Return the path of the last checkpoint."""
    training = work_dir / 'training'
    run('tools/train.py', config, '--data-root', str(data), '--work-dir', str(training), *options)
    checkpoint = (training / 'last_checkpoint').read_text()
    run(
        *('tools/test.py', config, checkpoint, '--data-root', str(data)),
        *('--work-dir', str(work_dir / 'test'), '--show-dir', str(work_dir / 'pictures')),
    )
    run('tools/plot_training.py', str(training), str(work_dir / 'training.png'))
    return checkpoint


def detect(config: str, data: Path, work_dir: Path, options: list[str]) -> None:
    checkpoint = train_and_test(config, data, work_dir, options)
    print(f'\nGround truth (left) and detections (right): {work_dir}/pictures/')
    print(f'Losses and AP: {work_dir}/training.png')
    print(f'Checkpoint: {checkpoint}')


def detect_shapes(data: Path, work_dir: Path, options: list[str]) -> None:
    run('tools/make_shapes.py', str(data))
    detect(SHAPES, data, work_dir, options)


def detect_photos(data: Path, work_dir: Path, options: list[str]) -> None:
    run('tools/fetch_bccd.py', str(data))
    detect(PHOTOS, data, work_dir, options)


def classify(data: Path, work_dir: Path, options: list[str]) -> None:
    shapes = work_dir / 'shapes'
    run('tools/make_digits.py', str(data))
    checkpoint = train_and_test(DIGITS, data, work_dir, options)
    # Start a detector from the weights of the classifier. A few iterations show how it is done.
    run('tools/make_shapes.py', str(shapes), '--num-train', '16', '--num-val', '4')
    # _delete_=True is needed because init_cfg is None in the config.
    run(
        *('tools/train.py', SHAPES, '--data-root', str(shapes), '--work-dir', str(work_dir / 'detector')),
        *('--cfg-options', 'train_cfg.max_iters=4', 'train_cfg.val_interval=4', 'default_hooks.logger.interval=1'),
        *('model.backbone.init_cfg._delete_=True', 'model.backbone.init_cfg.type=Pretrained'),
        f'model.backbone.init_cfg.checkpoint={checkpoint}',
    )
    print(f'\nPredictions: {work_dir}/pictures/')
    print(f'Losses and accuracy: {work_dir}/training.png')
    print(f'Checkpoint: {checkpoint}')


def segment(data: Path, work_dir: Path, options: list[str]) -> None:
    run('tools/make_shapes.py', str(data), '--label-maps')
    checkpoint = train_and_test(LABELS, data, work_dir, options)
    print(f'\nGround truth (left) and predictions (right): {work_dir}/pictures/')
    print(f'Losses and mIoU: {work_dir}/training.png')
    print(f'Checkpoint: {checkpoint}')


# Function and name of the folder of the data, by task.
TASKS = dict(
    detection=(detect_shapes, 'shapes'),
    photos=(detect_photos, 'bccd'),
    classification=(classify, 'digits'),
    segmentation=(segment, 'shapes'),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('task', nargs='?', choices=TASKS, default='detection', help='default: detection')
    parser.add_argument('--work-dir', type=Path, help='output folder (default: work_dirs/demo-TASK)')
    parser.add_argument('--data', type=Path, help='of photos: folder of BCCD, if you have it; nothing is downloaded')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='config options for the training, as KEY=VALUE')
    args = parser.parse_args()
    if args.data and args.task != 'photos':
        parser.error('--data is only for the task photos.')
    if args.data and not all((args.data / name).is_dir() for name in ('Annotations', 'ImageSets', 'JPEGImages')):
        parser.error(f'--data {args.data}: expected a folder that contains Annotations, ImageSets and JPEGImages.')

    run_task, name = TASKS[args.task]
    work_dir = args.work_dir or Path('work_dirs', f'demo-{args.task}')
    # Remove the outputs of an earlier demo, which has left this file there, but never those of another training.
    marker = work_dir / '.demo'
    if marker.exists():
        for old in ('training', 'pictures', 'detector'):
            shutil.rmtree(work_dir / old, ignore_errors=True)
    work_dir.mkdir(parents=True, exist_ok=True)
    marker.touch()
    options = ['--cfg-options', *args.cfg_options] if args.cfg_options else []
    run_task(args.data or work_dir / name, work_dir, options)


if __name__ == '__main__':
    main()
