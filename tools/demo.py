"""Make a synthetic data set, train Mask R-CNN with EfficientViM-M1 on it, evaluate, and draw what it finds.

Takes some eight minutes on two CPU cores. Each step is a command that is shown, and that works the same for other
configs.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

CONFIG = 'configs/demo/maskrcnn_evm_m1_shapes.py'


def run(*command: str) -> None:
    print('\n$ python', *command, flush=True)
    subprocess.run([sys.executable, *command], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--work-dir', type=Path, default='work_dirs/demo', help='where everything goes')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='handed on to tools/train.py')
    args = parser.parse_args()

    data, training, pictures = (args.work_dir / name for name in ('shapes', 'training', 'pictures'))
    options = ['--cfg-options', *args.cfg_options] if args.cfg_options else []
    if data.exists():  # what an earlier demo has left, and nobody else
        for old in (training, pictures):
            shutil.rmtree(old, ignore_errors=True)
    run('tools/make_shapes.py', str(data))
    run('tools/train.py', CONFIG, '--data-root', str(data), '--work-dir', str(training), *options)
    checkpoint = (training / 'last_checkpoint').read_text()
    run(
        *('tools/test.py', CONFIG, checkpoint, '--data-root', str(data)),
        *('--work-dir', str(args.work_dir / 'test'), '--show-dir', str(pictures)),
    )
    run('tools/plot_training.py', str(training), str(args.work_dir / 'training.png'))
    print(f'\nGround truth (left) beside detections (right): {pictures}/*.png')
    print(f'Losses and AP: {args.work_dir}/training.png')
    print(f'Checkpoint: {checkpoint}')


if __name__ == '__main__':
    main()
