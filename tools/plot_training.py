"""Plot the losses and the metrics of a training: ``python tools/plot_training.py work_dirs/NAME plot.png``."""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt

# What is plotted, and what it is divided by to lie between 0 and 1.
METRICS = {
    'coco/bbox_mAP_50': 1,
    'coco/segm_mAP_50': 1,
    'coco/bbox_mAP': 1,
    'coco/segm_mAP': 1,
    'accuracy/top1': 100,
    'accuracy/top5': 100,
}


def read_scalars(work_dir: Path) -> tuple[list[dict], list[dict]]:
    """What the latest run in a work dir logged: records of training and validation, with 'step' in iterations."""
    runs = sorted(work_dir.glob('*/vis_data/scalars.json'))
    if not runs:
        raise SystemExit(
            f'There is no log below {work_dir}: no */vis_data/scalars.json. Name the work dir of a training.'
        )
    records = [json.loads(line) for line in runs[-1].read_text().splitlines()]
    train = [record for record in records if 'loss' in record]
    if not train:
        raise SystemExit(f'{runs[-1]} has no losses: the training was shorter than the interval of its log.')
    val = [record for record in records if any(metric in record for metric in METRICS)]
    # mmengine counts validations in epochs if the training loop does.
    ends = {record['epoch']: record['step'] for record in train if 'epoch' in record}
    return train, [dict(record, step=ends.get(record['step'], record['step'])) for record in val]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('work_dir', type=Path, help='work dir of a training')
    parser.add_argument('out', type=Path, help='picture to write')
    args = parser.parse_args()

    train, val = read_scalars(args.work_dir)
    figure, (losses, metrics) = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
    for name in dict.fromkeys(key for record in train for key in record if 'loss' in key):
        points = [(record['step'], record[name]) for record in train if name in record]
        losses.plot(*zip(*points, strict=True), label=name, linewidth=2 if name == 'loss' else 1)
    losses.set(xlabel='iteration', ylabel='loss', ylim=(0, None), title='training')
    for name, unit in METRICS.items():
        points = [(record['step'], record[name] / unit) for record in val if name in record]
        if points:
            metrics.plot(*zip(*points, strict=True), marker='o', label=name.removeprefix('coco/'))
    metrics.set(xlabel='iteration', ylabel='metric', xlim=losses.get_xlim(), ylim=(0, 1), title='evaluation')
    for axes in (losses, metrics):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(args.out, dpi=100)


if __name__ == '__main__':
    main()
