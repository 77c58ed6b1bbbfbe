"""Measure what bfloat16 and int8 cost: the metrics of a trained model in each engine and precision, on its test split.

    python benchmarks/precision.py configs/bccd/rtmdet_evm_m1_bccd.py \\
        work_dirs/bccd/rtmdet_evm_m1_bccd_seed0/epoch_16.pth --data-root data/bccd --part detections \\
        --json docs/benchmarks/precision_bccd_m1.json

The int8 file is calibrated on the training split. Exported files go to work_dirs/precision/CONFIG_NAME.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from mmevm.analysis.latency import environment


def run(*command: str) -> None:
    subprocess.run([sys.executable, *command], check=True)


def evaluate(config: str, model: str, *options: str) -> dict:
    """Return the metrics of a checkpoint or an exported file on the test split."""
    with TemporaryDirectory() as folder:
        run('tools/test.py', config, model, '--work-dir', folder, *options)
        (file,) = Path(folder).glob('*/*.json')
        return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file of a detector or classifier')
    parser.add_argument('checkpoint', help='its trained weights')
    parser.add_argument('--part', choices=['model', 'detections'], required=True, help='model for a classifier')
    parser.add_argument('--data-root', help='folder of the data')
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/precision/CONFIG_NAME')
    parser.add_argument('--json', type=Path, help='write all metrics to this file')
    args = parser.parse_args()
    data = ['--data-root', args.data_root] if args.data_root else []
    work_dir = args.work_dir or Path('work_dirs/precision', Path(args.config).stem)
    work_dir.mkdir(parents=True, exist_ok=True)
    files = {name: str(work_dir / f'{name}.onnx') for name in ('float32', 'int8')}
    export = ['tools/export_onnx.py', args.config, args.checkpoint]
    run(*export, files['float32'], '--part', args.part)
    run(*export, files['int8'], '--part', args.part, '--precision', 'int8', '--calibration', 'train', *data)
    results = []
    for engine, precision, model, options in [
        ('pytorch', 'float32', args.checkpoint, []),
        ('pytorch', 'bfloat16', args.checkpoint, ['--dtype', 'bfloat16']),
        ('onnxruntime', 'float32', files['float32'], []),
        ('onnxruntime', 'int8', files['int8'], []),
        ('openvino', 'float32', files['float32'], ['--engine', 'openvino']),
        ('openvino', 'bfloat16', files['float32'], ['--engine', 'openvino', '--dtype', 'bfloat16']),
        ('openvino', 'int8', files['int8'], ['--engine', 'openvino']),
    ]:
        metrics = evaluate(args.config, model, *data, *options)
        results.append(dict(engine=engine, precision=precision, metrics=metrics))
    for result in results:
        values = ', '.join(f'{name} {value:.4g}' for name, value in result['metrics'].items())
        print(f'{result["engine"]}, {result["precision"]}: {values}')
    if args.json:
        parts = dict(config=args.config, results=results, environment=environment('cpu'))
        args.json.write_text(json.dumps(parts, indent=1) + '\n')


if __name__ == '__main__':
    main()
