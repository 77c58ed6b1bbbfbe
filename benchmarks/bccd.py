"""Train the detectors of configs/bccd/ with several seeds, and print a table of AP, parameters, GMACs and latency.

    python benchmarks/bccd.py train --data-root data/bccd       # all configs and seeds without a result
    python benchmarks/bccd.py train --data-root data/bccd --configs configs/bccd/rtmdet_evm_m1_bccd.py --seeds 0
    python benchmarks/bccd.py table

`train` writes one JSON file for each training to docs/benchmarks/bccd/: metrics on the test split, losses, metrics on
the validation split, and the machine. If it is interrupted, the next call resumes the training. `table` also reads
docs/benchmarks/bccd_latency.json, which tools/benchmark_latency.py writes:

    python tools/benchmark_latency.py --threads 2 --models configs/bccd/*.py --part detector --engine eager \\
        onnxruntime openvino --resolution 256x320 --batch-size 1 --rounds 25 --no-memory \\
        --reference configs/bccd/rtmdet_tiny_bccd.py --json docs/benchmarks/bccd_latency.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

from mmevm.analysis import build_without_weights, default_input_size, measure_complexity, padded_size
from mmevm.analysis.latency import Result, environment

CONFIGS = Path('configs/bccd')
RESULTS = Path('docs/benchmarks/bccd')
# AP of all classes, AP50, and AP of each class.
METRICS = dict(
    AP='bbox_mAP', AP50='bbox_mAP_50', RBC='RBC_precision', WBC='WBC_precision', Platelets='Platelets_precision'
)
LATENCY = Path('docs/benchmarks/bccd_latency.json')


def train(config: Path, seed: int, data_root: Path, work_dir: Path) -> dict:
    """Train and test a config; return what the JSON file of the training contains."""
    work_dir = work_dir / f'{config.stem}_seed{seed}'
    common = ['--data-root', str(data_root), '--cfg-options', f'randomness.seed={seed}']
    start = time.time()
    command = ['tools/train.py', str(config), '--work-dir', str(work_dir), '--resume', *common]
    subprocess.run([sys.executable, *command], check=True)
    seconds = time.time() - start
    checkpoint = (work_dir / 'last_checkpoint').read_text()
    command = ['tools/test.py', str(config), checkpoint, '--work-dir', str(work_dir / 'test'), *common]
    subprocess.run([sys.executable, *command], check=True)
    logs = sorted(work_dir.glob('*/vis_data/scalars.json'))  # one for each call; the folders' names are times
    return dict(
        config=str(config),
        seed=seed,
        test=json.loads(latest(work_dir / 'test', '*/*.json').read_text()),
        training=[json.loads(line) for log in logs for line in log.read_text().splitlines()],
        seconds=seconds,  # of the last call only, if the training was interrupted
        environment=environment('cpu'),
    )


def latest(folder: Path, pattern: str) -> Path:
    return max(folder.glob(pattern), key=lambda path: path.stat().st_mtime)


def train_all(configs: Sequence[Path], seeds: Sequence[int], data_root: Path, work_dir: Path) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        for config in configs:
            file = RESULTS / f'{config.stem}_seed{seed}.json'
            if file.exists():
                print(f'{file} exists: skipped')
                continue
            result = train(config, seed, data_root, work_dir)
            file.write_text(json.dumps(result, indent=1) + '\n')
            print(f'{file}: AP {result["test"]["coco/bbox_mAP"]:.3f}, AP50 {result["test"]["coco/bbox_mAP_50"]:.3f}')


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds, times 100."""
    mean = f'{100 * statistics.mean(values):.1f}'
    return f'{mean} ± {100 * statistics.stdev(values):.1f}' if len(values) > 1 else mean


def table(configs: Sequence[Path]) -> str:
    """Return a Markdown table with one row for each config that has results."""
    latencies: dict[tuple[str, str], float | None] = {}
    engines: list[str] = []
    if LATENCY.exists():
        for row in json.loads(LATENCY.read_text())['results']:
            latencies[Path(row['model']).stem, row['engine']] = Result(**row).milliseconds
            engines = [*engines, row['engine']] if row['engine'] not in engines else engines
    header = ['config', 'seeds', *METRICS, 'parameters (M)', 'GMACs', *(f'{engine} (ms)' for engine in engines)]
    lines = ['| ' + ' | '.join(header) + ' |', '|---' + '|---:' * (len(header) - 1) + '|']
    for config in configs:
        tests = [json.loads(file.read_text())['test'] for file in sorted(RESULTS.glob(f'{config.stem}_seed*.json'))]
        if not tests:
            continue
        cfg = Config.fromfile(config)
        model = build_without_weights(cfg)
        complexity = measure_complexity(model, (1, 3, *padded_size(model, default_input_size(cfg)[0])))
        cells = [f'{complexity.params / 1e6:.2f}', f'{complexity.flops / 1e9:.2f}']
        aps = [mean_and_spread([test[f'coco/{metric}'] for test in tests]) for metric in METRICS.values()]
        times = [latencies.get((config.stem, engine)) for engine in engines]
        cells += ['–' if milliseconds is None else f'{milliseconds:.1f}' for milliseconds in times]
        lines.append('| ' + ' | '.join([config.stem, str(len(tests)), *aps, *cells]) + ' |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('command', choices=['train', 'table'])
    parser.add_argument('--configs', type=Path, nargs='+', help='default: configs/bccd/*.py')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='default: 0 1 2')
    parser.add_argument('--data-root', type=Path, default=Path('data/bccd'), help='folder of BCCD (default: data/bccd)')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/bccd'), help='default: work_dirs/bccd')
    args = parser.parse_args()
    configs = args.configs or sorted(CONFIGS.glob('*.py'))
    if args.command == 'train':
        train_all(configs, args.seeds, args.data_root, args.work_dir)
    print(table(configs))


if __name__ == '__main__':
    main()
