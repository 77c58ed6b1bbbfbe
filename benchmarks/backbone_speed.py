"""Forward and forward+backward of the backbone beside timm's port of the authors' code, in one interleaved run.

    python benchmarks/backbone_speed.py --json docs/benchmarks/backbone_speed.json

Forward also has both in their forms for inference: ours after `switch_to_deploy`, timm's after `reparameterize_model`
and in channels_last. The machine's speed drifts, so all take turns, and ratios of their medians are what to quote.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from pathlib import Path

import timm
import torch
from timm.utils import reparameterize_model
from tqdm import trange

from mmevm.models import EfficientViM


class ChannelsLast(torch.nn.Module):
    """A model whose weights and images are in channels_last."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """As the model."""
        return self.model(x.contiguous(memory_format=torch.channels_last))


def measure(model: torch.nn.Module, x: torch.Tensor, backward: bool) -> float:
    """Seconds of one pass."""
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        outs = model(x)
        if backward:
            sum(out.sum() for out in outs).backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    model.zero_grad()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='m4', choices=list(EfficientViM.arch_settings))
    parser.add_argument('--batch-size', type=int, default=2)
    parser.add_argument('--size', type=int, default=512, help='side of the images in pixels')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--rounds', type=int, default=30, help='how often each takes its turn')
    parser.add_argument('--json', type=Path, help='write all times to this file')
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    timm_name = f'efficientvim_{args.arch}'
    models = {'mmevm': EfficientViM(args.arch), 'timm': timm.create_model(timm_name, features_only=True)}
    for model in models.values():
        model.to(args.device).eval()
    deployed = copy.deepcopy(models['mmevm'])
    deployed.switch_to_deploy()
    reparameterised = reparameterize_model(models['timm'])  # a copy
    forms = {'mmevm deployed': deployed, 'timm reparameterised': ChannelsLast(reparameterised)}
    x = torch.randn(args.batch_size, 3, args.size, args.size, device=args.device)
    result = dict(
        arguments={key: value for key, value in vars(args).items() if key != 'json'},
        versions=dict(torch=torch.__version__, timm=timm.__version__, python=platform.python_version()),
        device=torch.cuda.get_device_name() if x.is_cuda else _cpu_name(),
        seconds={},
    )
    for task, competitors in [('forward', models | forms), ('forward+backward', models)]:
        train = task != 'forward'
        for model in competitors.values():
            model.train(train)
            for _ in range(3):
                measure(model, x, backward=train)
        seconds = {name: [] for name in competitors}
        for i in trange(args.rounds, desc=task):
            for name in sorted(competitors, reverse=i % 2):
                seconds[name].append(measure(competitors[name], x, backward=train))
        result['seconds'][task] = seconds
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        print(f'{task}: ' + ', '.join(f'{name} {1e3 * median:.1f} ms' for name, median in medians.items()))
        for ours, theirs in [('mmevm', 'timm'), ('mmevm deployed', 'timm reparameterised')]:
            if ours in medians:
                print(f'    {ours} / {theirs} {medians[ours] / medians[theirs]:.3f}')
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + '\n')


def _cpu_name() -> str:
    names = [
        line.split(':')[1] for line in Path('/proc/cpuinfo').read_text().splitlines() if line.startswith('model name')
    ]
    return f'{names[0].strip()}, {len(names)} logical cores' if names else platform.processor()


if __name__ == '__main__':
    main()
