"""Measure what each optimization of deploy mode and of training gains: the backbone with and without it, interleaved.

    python benchmarks/optimizations.py --json docs/benchmarks/optimizations.json

A variant's time is divided by that of the first variant in the same round; the median of these ratios over all rounds
and its 95 % interval are printed. For training, the memory that autograd keeps for the backward pass, without weights,
is printed too.
"""

import argparse
import contextlib
import copy
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
from rich.progress import track
from scipy.stats import quantile_test
from timm.layers import SqueezeExcite
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmevm.analysis.latency import environment
from mmevm.analysis.latency.engines import prepare
from mmevm.analysis.latency.timing import enlarge_kernel_cache, interleave, warm_up
from mmevm.models import EfficientViM, efficientvim
from mmevm.models.layers import ConvNorm
from mmevm.models.mixers import DeployHSMSSD
from mmevm.models.packed_conv import PackedConv2d

SIDES = [(1, 1), (1.25, 0.75), (0.75, 1.25), (0.875, 1.125)]  # image sizes of the task "sizes", relative to --size


class Pointwise(nn.Module):
    """A 1×1 convolution computed as a matrix product of tokens."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(conv.weight.flatten(1)), conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) in channels_last to (B, C', H, W)."""
        return nn.functional.linear(x.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


def pointwise_as_linear(model: nn.Module) -> nn.Module:
    """Return a copy with matrix products for its 1×1 convolutions, except in squeeze-and-excitation."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and not isinstance(parent, SqueezeExcite):
                setattr(parent, name, Pointwise(module))
    return model


def pack_pointwise(model: nn.Module) -> nn.Module:
    """Return a copy in which only the 1×1 convolutions, with most of the weights, are packed."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, PackedConv2d) and module.kernel_size != (1, 1):
            module.__class__ = nn.Conv2d
    return model


def mix_states_as_rows(self: DeployHSMSSD, h: Tensor) -> Tensor:
    """``DeployHSMSSD.mix_states`` with the hidden states as rows of the products."""
    h, z = nn.functional.linear(h, self.hz_proj).chunk(2, dim=-1)
    return nn.functional.linear(h * (nn.functional.silu(z) + self.D), self.out_proj).transpose(1, 2)


class InParts(nn.Module):
    """Run a model on four images of 512×512 at a time, from the first layer to the last."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the outputs of the model."""
        parts = [self.model(part) for part in x.split(max(4 * 512**2 // x[0, 0].numel(), 1))]
        return [torch.cat(maps) for maps in zip(*parts, strict=True)]


class Compiled(nn.Module):
    """Run a model compiled by torch.compile, once for each input shape."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls: dict[torch.Size, Callable] = {}

    def forward(self, x: Tensor) -> Any:
        """Return the outputs of the model."""
        if x.shape not in self.calls:
            self.calls[x.shape] = prepare('compile', self.model, x)
        return self.calls[x.shape](x)


def forward(model: nn.Module, x: Tensor, setting: Callable = contextlib.nullcontext) -> None:
    """Run one forward pass."""
    with torch.no_grad(), setting():
        model(x)


def forward_each(model: nn.Module, images: list[Tensor], setting: Callable = contextlib.nullcontext) -> None:
    """Run a forward pass for each image, each of another size."""
    for x in images:
        forward(model, x, setting)


def train(model: nn.Module, x: Tensor, setting: Callable = contextlib.nullcontext) -> None:
    """Run one forward and backward pass."""
    model.zero_grad()
    with setting():
        sum(out.sum() for out in model(x)).backward()


def kept_for_backward(model: nn.Module, x: Tensor, setting: Callable = contextlib.nullcontext) -> int:
    """Return the bytes that autograd keeps of one forward pass, without the parameters."""
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with setting(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(x)
    del outputs
    return sum(storages.values())


def inference(arch: str) -> dict[str, tuple]:
    """Return the variants of a forward pass: a model, and a context manager to run it in."""
    trained = EfficientViM(arch).eval()
    deployed = copy.deepcopy(trained)
    deployed.switch_to_deploy()
    peer = reparameterize_model(timm.create_model(f'efficientvim_{arch}', features_only=True).eval())
    unpacked = partial(mock.patch.object, PackedConv2d, '_can_be_packed', lambda self, x: False)
    rows = partial(mock.patch.object, DeployHSMSSD, 'mix_states', mix_states_as_rows)
    whole = partial(mock.patch.object, efficientvim, '_MAX_TOKENS', 2**62)
    peer = peer.to(memory_format=torch.channels_last)
    return {
        'deployed': (deployed,),
        'timm, reparameterized': (peer,),
        'timm, reparameterized, in parts': (InParts(peer),),
        'as trained': (trained,),
        # separate copies, as packed weights would persist between variants
        'deployed, no weights packed': (copy.deepcopy(deployed), unpacked),
        'deployed, weights of 1×1 convolutions packed': (pack_pointwise(deployed),),
        'deployed, hidden states as rows': (copy.deepcopy(deployed), rows),
        'deployed, the batch as a whole': (copy.deepcopy(deployed), whole),
        'deployed, all layers in parts of four': (InParts(copy.deepcopy(deployed)),),
        'deployed, 1×1 convolutions as matrix products': (pointwise_as_linear(deployed),),
        'deployed, torch.compile': (Compiled(copy.deepcopy(deployed)),),
        'deployed, torch.compile, in parts of four': (InParts(Compiled(copy.deepcopy(deployed))),),
    }


def training(arch: str) -> dict[str, tuple]:
    """Return the variants of training with fixed BatchNorm statistics."""
    peer = timm.create_model(f'efficientvim_{arch}', features_only=True).train()
    for module in peer.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    ours = EfficientViM(arch, norm_eval=True, channels_last=False).train()
    apart = partial(mock.patch.object, ConvNorm, '_has_fixed_statistics', lambda self: False)
    return {
        'norm_eval': (ours,),
        'timm': (peer,),
        'timm, channels_last': (copy.deepcopy(peer).to(memory_format=torch.channels_last),),
        'norm_eval, BatchNorm apart': (ours, apart),
        'norm_eval, channels_last': (copy.deepcopy(ours).to(memory_format=torch.channels_last),),
        'norm_eval, with_cp': (EfficientViM(arch, norm_eval=True, with_cp=True, channels_last=False).train(),),
    }


def measure(step: Callable, variants: dict[str, tuple], x: Any, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each variant by round."""
    calls = {name: partial(step, model, x, *setting) for name, (model, *setting) in variants.items()}
    for call in calls.values():
        warm_up(call)
    seconds, errors = interleave(calls, rounds)
    if errors:
        raise next(iter(errors.values()))
    return seconds


def compare(seconds: list[float], reference: list[float]) -> tuple[float, float, float]:
    """Return the median of the ratios to the reference by round, and its 95 % interval."""
    ratios = [time / other for time, other in zip(seconds, reference, strict=True)]
    interval = quantile_test(ratios).confidence_interval()
    return statistics.median(ratios), interval.low, interval.high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='m4', choices=list(EfficientViM.arch_settings))
    parser.add_argument('--size', type=int, default=512, help='side of the images in pixels')
    parser.add_argument('--batch-size', type=int, nargs='+', default=[1, 16], help='images per forward pass')
    parser.add_argument('--train-batch-size', type=int, default=8)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument(
        '--rounds',
        type=int,
        default=15,
        help='rounds; with n < 8 images per pass, 8 // n times as many',
    )
    parser.add_argument('--json', type=Path, help='write all times to this file')
    args = parser.parse_args()

    enlarge_kernel_cache()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    arguments = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}

    def images(batch_size: int, height: float = 1, width: float = 1) -> Tensor:
        return torch.randn(batch_size, 3, int(height * args.size), int(width * args.size))

    results = []
    steps = [('forward', forward, inference, images(batch_size)) for batch_size in args.batch_size]
    steps.append(('sizes', forward_each, inference, [images(1, *sides) for sides in SIDES]))
    steps.append(('training', train, training, images(args.train_batch_size)))
    for task, step, make, x in track(steps):
        variants = make(args.arch)
        batch_size = len(x)
        # short calls are noisier and cheaper to repeat
        times = measure(step, variants, x, args.rounds * max(8 // batch_size, 1))
        reference = times[next(iter(variants))]
        for name, seconds in times.items():
            milliseconds = 1e3 * statistics.median(seconds) / batch_size
            ratio, low, high = compare(seconds, reference)
            row = dict(task=task, batch_size=batch_size, variant=name, relative=[ratio, low, high], seconds=seconds)
            text = f'{task}, batch {batch_size}: {name}: {milliseconds:.1f} ms/image, '
            text += f'{ratio:.3f} ({low:.3f}–{high:.3f})'
            if task == 'training':
                model, *setting = variants[name]
                row['kept_for_backward'] = kept_for_backward(model, x, *setting)
                text += f', keeps {row["kept_for_backward"] / batch_size / 1e6:.0f} MB/image'
            results.append(row)
            print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        parts = dict(arguments=arguments, environment=environment(), results=results)
        args.json.write_text(json.dumps(parts, indent=1) + '\n')


if __name__ == '__main__':
    main()
