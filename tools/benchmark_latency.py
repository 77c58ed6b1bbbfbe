"""Compare the speed of mmevm's models with others on this machine.

By default it times backbones at 512×512, like the latencies in the paper's Table B: mmevm's m4 and the peers that timm
has. That takes a few minutes on two CPU cores. Weights are random, and nothing is downloaded. A model that fails, or an
engine that is not installed, is reported in its row. Compare times within one run only, as most machines' speed drifts.
"""

import argparse
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

import mmevm
from mmevm.analysis import latency
from mmevm.analysis.latency import ModelSpec, Result, plots
from mmevm.analysis.latency.benchmark import cudnn_settings, default_batch_size
from mmevm.analysis.latency.results import summarize_error
from mmevm.analysis.latency.timing import enlarge_kernel_cache
from mmevm.cli import run
from mmevm.errors import ConfigError


def image_size(text: str) -> tuple[int, int | None]:
    """Return height, and width or None for a square."""
    height, _, width = text.partition('x')
    return positive(height), positive(width) if width else None


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text} is less than 1')
    return int(text)


def parse_args() -> tuple[argparse.Namespace, list[ModelSpec]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group('models')
    what.add_argument(
        '--models',
        nargs='+',
        default=list(latency.DEFAULT_MODELS),
        metavar='NAME',
        help="m1 to m4 for mmevm's backbones, any timm model, a config as a path or a name such as mmdet::…, or an "
        'ONNX file for the engines that run one; the suffix @trained excludes a model from deploy mode '
        f'(default: {" ".join(latency.DEFAULT_MODELS)})',
    )
    what.add_argument(
        '--part',
        choices=latency.PARTS,
        default='backbone',
        help="part of a config's model: the backbone; the whole model, of a detector without post-processing; or a "
        'detector from an image in memory to its objects, with the time of each stage (default: backbone)',
    )
    what.add_argument('--no-deploy', dest='deploy', action='store_false', help='do not switch models to deploy mode')
    what.add_argument(
        '--train',
        action='store_true',
        help='time forward and backward in training mode, with every BatchNorm in eval mode as in a detector',
    )
    how = parser.add_argument_group('settings')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    how.add_argument('--device', choices=['cpu', 'cuda'], default=device, help='(default: cuda if there is a GPU)')
    how.add_argument('--engine', nargs='+', choices=latency.ENGINES, default=['eager'], help='(default: eager)')
    how.add_argument(
        '--resolution',
        nargs='+',
        type=image_size,
        default=[(512, None)],
        metavar='PIXELS',
        help='image sides, or height and width as in 800x1344 (default: 512)',
    )
    how.add_argument(
        '--batch-size',
        nargs='+',
        type=positive,
        metavar='IMAGES',
        help='images per call, halved if they do not fit into a GPU (default: 16 on the CPU and 256 on CUDA, as in '
        'the paper; above 512×512 as many pixels)',
    )
    how.add_argument('--dtype', nargs='+', choices=list(latency.DTYPES), default=['float32'], help='(default: float32)')
    how.add_argument(
        '--no-channels-last',
        dest='channels_last',
        action='store_false',
        help='do not use channels_last in PyTorch, except in deploy mode',
    )
    how.add_argument('--threads', type=positive, help="CPU threads of every engine (default: PyTorch's number)")
    how.add_argument('--rounds', type=positive, help='calls to time (default: 7 on the CPU, 50 on CUDA)')
    how.add_argument('--no-memory', dest='memory', action='store_false', help='do not measure peak memory')
    out = parser.add_argument_group('output')
    out.add_argument(
        '--reference',
        metavar='NAME',
        help='model that the column `relative` divides by (default: efficientvim_m4 if it is timed, or the first)',
    )
    out.add_argument('--json', type=Path, metavar='FILE', help='write all times to this file, setting by setting')
    out.add_argument('--plot', type=Path, metavar='DIR', help='write plots to this folder')
    out.add_argument(
        '--breakdown',
        action='store_true',
        help='print where the time of each model goes, in eager mode at the first resolution, batch size and dtype',
    )
    args = parser.parse_args()

    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error(f'--device cuda: PyTorch {torch.__version__} finds no GPU. Use --device cpu.')
    if args.train and args.breakdown:
        parser.error('--breakdown supports inference only. Remove --breakdown or --train.')
    if args.part == 'detector' and args.breakdown:
        parser.error('--breakdown is for --part backbone or model.')
    if args.reference is None:
        args.reference = 'efficientvim_m4' if 'efficientvim_m4' in args.models else args.models[0]
    elif args.reference not in args.models:
        parser.error(f'--reference {args.reference} is not one of --models: {", ".join(args.models)}.')
    try:
        return args, [ModelSpec(name, args.part) for name in args.models]
    except (ConfigError, ValueError) as error:
        parser.error(f'--models: {error}')


def break_down_all(specs: list[ModelSpec], setting: latency.Setting, results: list[Result]) -> dict[str, dict]:
    """Print the breakdown of each model in a setting and return all."""
    found: dict[str, dict] = {}
    autocast = latency.DTYPES[setting.dtype][1]
    for spec in specs:
        batch_size = next(result.batch_size for result in results if result.model == spec.name)
        setting = replace(setting, batch_size=batch_size)
        print(f'\n{spec.name}, {"×".join(map(str, setting.size))}, batch {batch_size}, {setting.dtype}')
        try:
            model, x = latency.build(spec, setting)
            with cudnn_settings(), torch.autocast(setting.device, autocast, enabled=autocast is not None):
                breakdown = latency.break_down(model, x)
        except Exception as error:  # report it and continue with the other models
            found[spec.name] = dict(error=summarize_error(error))
            print(f'No breakdown: {summarize_error(error)}')
        else:
            found[spec.name] = asdict(breakdown)
            print(breakdown.table())
    return found


def plot(args: argparse.Namespace, results: list[Result], title: str) -> None:
    figures = dict(latency=partial(plots.draw_latency, reference=args.reference), box_ap=plots.draw_pareto)
    if len(set(args.resolution)) > 1:
        figures['resolution'] = partial(plots.draw_lines, along='resolution')
    if len(set(args.batch_size or ())) > 1:
        figures['batch'] = partial(plots.draw_lines, along='batch_size')
    args.plot.mkdir(parents=True, exist_ok=True)
    for name, draw in figures.items():
        file = args.plot / f'{name}.png'
        try:
            draw(results, title=title).savefig(file, dpi=120)
        except ValueError as error:
            print(f'{file} not drawn: {error}')


def main() -> None:
    args, specs = parse_args()
    enlarge_kernel_cache()
    if args.threads:
        torch.set_num_threads(args.threads)
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    machine = latency.environment(args.device)
    parts = dict(arguments=arguments, environment=machine)
    device = machine['gpu'] or f'{machine["cpu"]} ({machine["cpu_capability"]})'
    settings = [
        latency.Setting(height, batch_size, dtype, args.device, args.deploy, args.channels_last, args.train, width)
        for height, width in args.resolution
        for batch_size in args.batch_size or [default_batch_size(args.device, height, width or height)]
        for dtype in args.dtype
    ]
    title = f'{device}, {machine["threads"]} threads, PyTorch {torch.__version__}'

    results = []
    with Console(stderr=True).status('') as status:
        for result in latency.benchmark(specs, settings, args.engine, args.rounds, args.memory, status.update):
            results.append(result)
            if args.json:
                latency.write_json(args.json, results, **parts)
    print(f'{title}, mmevm {mmevm.__version__} ({machine["commit"] or "no checkout"})\n')
    print(latency.table(results, args.reference))
    if args.breakdown:
        parts['breakdown'] = break_down_all(specs, settings[0], results)
        if args.json:
            latency.write_json(args.json, results, **parts)
    if args.plot:
        plot(args, results, title)
    if not any(result.seconds for result in results):
        sys.exit('No model could be measured; the reasons are listed above.')


if __name__ == '__main__':
    run(main)
