"""Plot the losses and metrics of a training: ``python tools/plot_training.py work_dirs/NAME plot.png``."""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

# Metrics to plot, and their largest possible value.
METRICS = {
    'coco/bbox_mAP_50': 1,
    'coco/segm_mAP_50': 1,
    'coco/bbox_mAP': 1,
    'coco/segm_mAP': 1,
    'accuracy/top1': 100,
    'accuracy/top5': 100,
    'mIoU': 100,
}


def read_scalars(work_dir: Path) -> tuple[list[dict], list[dict]]:
    """Read the log of the latest run in a work dir.

    Returns:
        Records of training and of validation, with 'step' in iterations.
    """
    runs = sorted(work_dir.glob('*/vis_data/scalars.json'))
    if not runs:
        raise SystemExit(f'{work_dir} contains no */vis_data/scalars.json. Pass the work dir of a training.')
    train, val = [], []
    for line in runs[-1].read_text().splitlines():
        record = json.loads(line)
        if 'loss' in record:
            train.append(record)
        elif METRICS.keys() & record.keys():
            # The step of a validation is in epochs by default, so take that of the last training record if it is later.
            step = max([record['step'], *(previous['step'] for previous in train[-1:])])
            val.append(dict(record, step=step))
    if not train:
        raise SystemExit(f'{runs[-1]} contains no losses: the training was shorter than its logging interval.')
    return train, val


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('work_dir', type=Path, help='work dir of a training')
    parser.add_argument('out', type=Path, help='image file to write')
    args = parser.parse_args()

    train, val = read_scalars(args.work_dir)
    figure, (losses, metrics) = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
    for name in dict.fromkeys(key for record in train for key in record if 'loss' in key):
        points = [(record['step'], record[name]) for record in train if name in record]
        losses.plot(*zip(*points, strict=True), label=name, linewidth=2 if name == 'loss' else 1)
    losses.set(xlabel='iteration', ylabel='loss', ylim=(0, None), title='training')
    for name, maximum in METRICS.items():
        points = [(record['step'], record[name] / maximum) for record in val if name in record]
        if points:
            metrics.plot(*zip(*points, strict=True), marker='o', label=name.removeprefix('coco/'))
    metrics.set(xlabel='iteration', ylabel='metric', xlim=losses.get_xlim(), ylim=(0, 1), title='validation')
    for axes in (losses, metrics):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(args.out, dpi=100)


if __name__ == '__main__':
    main()
