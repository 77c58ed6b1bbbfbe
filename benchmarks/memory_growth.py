"""Check that memory does not grow with images of changing sizes, in training and inference.

    python benchmarks/memory_growth.py --json docs/benchmarks/memory_growth.json

Each case runs in a process of its own, whose resident memory is read after each step. Caches fill during a warm-up:
oneDNN keeps up to 1024 plans, one for each layer and shape. A Theil-Sen line is fitted to the steps after it, as its
slope is robust to single large images. The growth is the rise of that line in percent of its start. The exit status is
1 if any case grows by more than --allowed. timm's backbone is included for comparison.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from scipy.stats import theilslopes

from mmevm.analysis.latency import ModelSpec, environment
from mmevm.cli import build_runner, read_config, replace_data_root

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / 'configs/demo/maskrcnn_evm_m1_shapes.py'
SMALLEST, LARGEST = 64, 320  # pixels of a side
KEPT = 100  # readings written to the file, evenly spaced


def resident() -> float:
    """Return the resident memory of this process in megabytes."""
    return psutil.Process().memory_info().rss / 1e6


class Readings(Hook):
    """Record the resident memory after each training iteration."""

    def __init__(self) -> None:
        self.megabytes: list[float] = []

    def after_train_iter(self, *args: Any, **kwargs: Any) -> None:
        """Record it."""
        self.megabytes.append(resident())


def read_demo(folder: str) -> Config:
    cfg = read_config(str(CONFIG))
    cfg.work_dir = folder
    return cfg


def train(steps: int) -> list[float]:
    """Train the demo's Mask R-CNN on batches of two randomly resized images."""
    with tempfile.TemporaryDirectory(prefix='mmevm-memory-') as folder:
        data = f'{folder}/shapes'
        subprocess.run(
            [sys.executable, ROOT / 'tools/make_shapes.py', data, '--num-train', '32', '--num-val', '4'], check=True
        )
        cfg = replace_data_root(read_demo(folder), data)
        loader = cfg.train_dataloader
        loader.batch_size = 2
        (resize,) = (step for step in loader.dataset.pipeline if step['type'] == 'Resize')
        resize.update(type='RandomResize', scale=[(SMALLEST, SMALLEST), (LARGEST, LARGEST)])
        cfg.train_cfg.update(max_iters=steps, val_interval=steps + 1)
        cfg.default_hooks.checkpoint.interval = steps + 1
        cfg.randomness = dict(seed=0)
        cfg.launcher = 'none'
        runner = build_runner(cfg)
        readings = Readings()
        runner.register_hook(readings, priority='LOWEST')
        runner.train()
        return readings.megabytes


def infer(call: Callable[[int, int], Any], steps: int) -> list[float]:
    """Call with random heights and widths, and return the readings."""
    draw = np.random.default_rng(0)
    readings = []
    for _ in range(steps):
        height, width = draw.integers(SMALLEST, LARGEST + 1, 2).tolist()
        call(height, width)
        readings.append(resident())
    return readings


def infer_backbone(steps: int, name: str) -> list[float]:
    spec = ModelSpec(name)
    model = spec.deploy(spec.build())
    with torch.no_grad():
        return infer(lambda height, width: model(torch.rand(1, 3, height, width)), steps)


def infer_detector(steps: int) -> list[float]:
    """Run MMDetection's inference without resizing the images."""
    from mmcv.transforms import Compose
    from mmdet.apis import inference_detector, init_detector

    with tempfile.TemporaryDirectory(prefix='mmevm-memory-') as folder:
        model = init_detector(read_demo(folder), device='cpu', palette='random')
    resize = dict(type='mmdet.Resize', scale_factor=1.0)
    pipeline = Compose([dict(type='mmdet.LoadImageFromNDArray'), resize, dict(type='mmdet.PackDetInputs')])
    draw = np.random.default_rng(0)

    def call(height: int, width: int) -> None:
        image = draw.integers(0, 256, (height, width, 3), dtype=np.uint8)
        inference_detector(model, image, test_pipeline=pipeline)

    return infer(call, steps)


@dataclass(frozen=True)
class Case:
    """A function to repeat, and its steps before and during the measurement."""

    function: Callable[[int], list[float]]
    unit: str
    warm_up: int
    steps: int


CASES = {
    'training': Case(train, 'iterations', warm_up=300, steps=300),
    'backbone': Case(partial(infer_backbone, name='m1@trained'), 'images', warm_up=2000, steps=2000),
    'deployed backbone': Case(partial(infer_backbone, name='m1'), 'images', warm_up=2000, steps=2000),
    "timm's backbone": Case(partial(infer_backbone, name='efficientvim_m1'), 'images', warm_up=2000, steps=2000),
    'detector': Case(infer_detector, 'images', warm_up=1000, steps=1000),
}


def summarize(readings: list[float], warm_up: int) -> dict[str, Any]:
    """Fit a line to the readings after the warm-up, and select evenly spaced readings."""
    at = np.unique(np.linspace(warm_up, len(readings) - 1, 500).round().astype(int))
    slope, intercept, low, high = theilslopes(np.array(readings)[at], at)
    start = intercept + slope * warm_up
    kept = np.unique(np.linspace(0, len(readings) - 1, KEPT).round().astype(int)).tolist()
    return dict(
        growth_percent=round(100 * slope * (len(readings) - 1 - warm_up) / start, 2),
        megabytes_after_warm_up=round(start, 1),
        megabytes_per_1000=round(1000 * slope, 2),
        interval_of_95_percent=[round(1000 * low, 2), round(1000 * high, 2)],
        readings=[[i, round(readings[i], 1)] for i in kept],
    )


def measure(name: str, share: float) -> dict[str, Any]:
    """Measure one case in a process of its own."""
    case = CASES[name]
    warm_up, steps = (max(int(share * number), 4) for number in (case.warm_up, case.steps))
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
        readings = pool.submit(case.function, warm_up + steps).result()
    return dict(case=name, unit=case.unit, warm_up=warm_up, steps=steps) | summarize(readings, warm_up)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--json', type=Path, help='write all results to this file')
    parser.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES), help='(default: all)')
    parser.add_argument('--share', type=float, default=1.0, help='fraction of warm-up and steps to run (default: 1)')
    parser.add_argument('--allowed', type=float, default=3.0, help='allowed growth in percent (default: 3)')
    args = parser.parse_args()

    results = []
    for name in args.cases:
        result = measure(name, args.share)
        results.append(result)
        print(
            f'{name}: {result["growth_percent"]:+.2f} % in {result["steps"]} {result["unit"]}, from '
            f'{result["megabytes_after_warm_up"]:.0f} MB by {result["megabytes_per_1000"]:+.2f} MB per 1000',
            flush=True,
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        sizes = f'random sides of {SMALLEST} to {LARGEST} pixels'
        parts = dict(
            images=sizes, fit='Theil-Sen', allowed_percent=args.allowed, environment=environment(), results=results
        )
        args.json.write_text(json.dumps(parts, indent=1) + '\n')
    if growing := [result['case'] for result in results if result['growth_percent'] > args.allowed]:
        sys.exit(f'Memory grows by more than {args.allowed:g} %: {", ".join(growing)}.')


if __name__ == '__main__':
    main()
