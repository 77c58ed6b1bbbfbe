"""Time mmevm's models beside others, in turns, on this machine.

Without arguments it times backbones alone at 512×512, as the latencies of the paper's Table B: mmevm's m4, and those of
its peers that timm has. That takes a few minutes on two cores; a smaller --batch-size, fewer --rounds, --no-memory or
fewer --models make it shorter.

Weights are random, and nothing is downloaded. A model that fails, or an engine that is not installed, is a row that
says why. Compare within a run: the speed of most machines drifts.
"""

import argparse
import contextlib
import sys
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from mmevm.analysis.latency import (
    DEFAULT_MODELS,
    DTYPES,
    ENGINES,
    PARTS,
    ModelSpec,
    Result,
    benchmark,
    break_down,
    environment,
    plots,
    table,
    write_json,
)
from mmevm.analysis.latency.benchmark import Setting, build, cuda_settings
from mmevm.analysis.latency.model_spec import AS_TRAINED
from mmevm.analysis.latency.results import in_one_line
from mmevm.analysis.latency.timing import keep_kernels
from mmevm.cli import run
from mmevm.errors import ConfigError


def parse_args() -> tuple[argparse.Namespace, list[ModelSpec]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group('what is timed')
    what.add_argument(
        '--models',
        nargs='+',
        default=list(DEFAULT_MODELS),
        metavar='NAME',
        help="m1 to m4 for mmevm's backbones, any name of timm's, the path of a config, or something like mmdet::…; "
        f'with {AS_TRAINED} after it in the form in which it is trained, beside the deployed ones '
        f'(default: {" ".join(DEFAULT_MODELS)})',
    )
    what.add_argument(
        '--part',
        choices=PARTS,
        default='backbone',
        help="what of a config's model: a whole detector goes up to what its heads put out (default: backbone)",
    )
    what.add_argument(
        '--deploy',
        action=argparse.BooleanOptionalAction,
        default=None,
        help="time the forms for inference, mmevm's and timm's (default: yes, but with --train)",
    )
    what.add_argument(
        '--train',
        action='store_true',
        help='time forward and backward in training mode, with every BatchNorm in eval mode as in a detector',
    )
    what.add_argument(
        '--with-cp', action='store_true', help="with --train, recompute the activations of mmevm's backbones"
    )
    how = parser.add_argument_group('how')
    how.add_argument(
        '--device',
        choices=['cpu', 'cuda'],
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='(default: cuda where there is a GPU)',
    )
    how.add_argument(
        '--engine', nargs='+', choices=list(ENGINES), default=['eager'], help='what runs the models (default: eager)'
    )
    how.add_argument(
        '--resolution', nargs='+', type=int, default=[512], metavar='PIXELS', help='sides of images (default: 512)'
    )
    how.add_argument(
        '--batch-size',
        nargs='+',
        type=int,
        metavar='IMAGES',
        help='images of a call, halved automatically where memory does not suffice, which the row says (default: 16 on '
        "the CPU and 256 on CUDA, as the paper's supplement; above 512×512 fewer, of as many pixels in all)",
    )
    how.add_argument('--dtype', nargs='+', choices=list(DTYPES), default=['float32'], help='(default: float32)')
    how.add_argument(
        '--channels-last',
        action=argparse.BooleanOptionalAction,
        default=True,
        help="memory format of PyTorch's weights and images (default: yes)",
    )
    how.add_argument('--threads', type=int, help="CPU threads of every engine (default: PyTorch's number)")
    how.add_argument('--rounds', type=int, help='how often each has its turn (default: 7 on the CPU, 50 on CUDA)')
    how.add_argument('--no-memory', dest='memory', action='store_false', help='do not measure peak memory')
    out = parser.add_argument_group('what comes out')
    out.add_argument(
        '--reference',
        metavar='NAME',
        help='model that the column `relative` divides by (default: efficientvim_m4, or else the first)',
    )
    out.add_argument('--json', type=Path, metavar='FILE', help='write all times to this file, setting by setting')
    out.add_argument('--plot', type=Path, metavar='DIR', help='write pictures to this folder')
    out.add_argument(
        '--breakdown',
        action='store_true',
        help='print where the time of each model goes, in eager mode at the first resolution, batch size and dtype',
    )
    args = parser.parse_args()

    for name in ('resolution', 'batch_size', 'threads', 'rounds'):
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f'--{name.replace("_", "-")} takes numbers from 1 on, not {value}.')
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error(f'--device cuda: PyTorch {torch.__version__} sees no GPU here; take --device cpu.')
    if args.with_cp and not args.train:
        parser.error('--with-cp recomputes activations for the backward pass: give it together with --train.')
    if args.train and args.deploy:
        parser.error('--deploy is the form for inference, which cannot be trained: leave out --deploy or --train.')
    if args.train and args.breakdown:
        parser.error('--breakdown is of inference: leave out --breakdown or --train.')
    args.deploy = not args.train if args.deploy is None else args.deploy
    if args.reference is None:
        args.reference = 'efficientvim_m4' if 'efficientvim_m4' in args.models else args.models[0]
    elif args.reference not in args.models:
        parser.error(f'--reference {args.reference} is none of the models: {", ".join(args.models)}.')
    try:
        return args, [ModelSpec(name, args.part, args.with_cp) for name in args.models]
    except (ConfigError, ValueError) as error:
        parser.error(f'--models: {error}')


def measure(args: argparse.Namespace, subjects: list[ModelSpec], write) -> list[Result]:
    """All rows; what has been measured is written after each."""
    results = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task('', total=1)
        for result in benchmark(
            subjects,
            args.resolution,
            args.batch_size,
            args.dtype,
            args.engine,
            args.device,
            deploy=args.deploy,
            channels_last=args.channels_last,
            training=args.train,
            threads=args.threads,
            rounds=args.rounds,
            memory=args.memory,
            progress=lambda text, share: bar.update(task, description=text, completed=share),
        ):
            results.append(result)
            write(results)
    return results


def break_down_all(args: argparse.Namespace, subjects: list[ModelSpec], results: list[Result]) -> dict[str, dict]:
    """Print where the time of each model goes."""
    found = {}
    dtype = args.dtype[0]
    autocast = DTYPES[dtype][1]
    for subject in subjects:
        batch_size = next(result.batch_size for result in results if result.model == subject.name)
        setting = Setting(args.resolution[0], batch_size, dtype, args.device, args.deploy, args.channels_last)
        print(f'\n{subject.name}, {args.resolution[0]}×{args.resolution[0]}, batch {batch_size}, {dtype}')
        try:
            model, x = build(subject, setting)
            with cuda_settings(), torch.autocast(args.device, autocast) if autocast else contextlib.nullcontext():
                breakdown = break_down(model, x)
        except Exception as error:  # one model's failure is not the others'
            found[subject.name] = dict(error=in_one_line(error))
            print(f'cannot be broken down: {in_one_line(error)}')
        else:
            found[subject.name] = breakdown.as_dict()
            print(breakdown.table())
    return found


def plot(args: argparse.Namespace, results: list[Result], title: str) -> None:
    pictures = dict(
        latency=partial(plots.draw_latency, reference=args.reference),
        top1=plots.draw_pareto,
        box_ap=partial(plots.draw_pareto, accuracy='box_ap'),
    )
    if len(set(args.resolution)) > 1:
        pictures['resolution'] = plots.draw_resolution
    if len(set(args.batch_size or ())) > 1:
        pictures['batch'] = plots.draw_batch
    args.plot.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures.items():
        file = args.plot / f'{name}.png'
        try:
            draw(results, title).savefig(file, dpi=120)
        except ValueError as error:
            print(f'{file} is not drawn: {error}')


def main() -> None:
    args, subjects = parse_args()
    keep_kernels()
    if args.threads:
        torch.set_num_threads(args.threads)
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    parts = dict(arguments=arguments, environment=environment(args.device))
    where = parts['environment']
    device = where['gpu'] or f'{where["cpu"]} ({where["cpu_capability"]})'
    title = f'{device}, {where["threads"]} threads, PyTorch {torch.__version__}'

    def write(results: list[Result]) -> None:
        if args.json:
            write_json(args.json, results, **parts)

    results = measure(args, subjects, write)
    print(f'{title}, mmevm {where["versions"].get("mmevm")} ({where["commit"] or "no checkout"})\n')
    print(table(results, args.reference))
    if args.breakdown:
        parts['breakdown'] = break_down_all(args, subjects, results)
        write(results)
    if args.plot:
        plot(args, results, title)
    if not any(result.seconds for result in results):
        sys.exit('Nothing could be measured; the reasons are above.')


if __name__ == '__main__':
    run(main)
