import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import succeed
from mmengine.logging import MessageHub
from mmengine.model import BaseModel
from mmengine.runner import Runner

from mmevm.engine.hooks import peak_memory


class Line(BaseModel):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.ballast = []

    def forward(self, inputs, mode):
        self.ballast.append(torch.ones(2**24))  # 64 MB more in each iteration
        return dict(loss=(self.weight - inputs[0]).square().sum())


def peak_of_this_process():
    (line,) = [line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM:')]
    return int(line.split()[1]) / 1024  # MB


def test_logged_peak_memory_equals_that_of_the_kernel(tmp_path):
    Runner(
        model=Line(),
        work_dir=str(tmp_path),
        train_dataloader=dict(
            dataset=[torch.ones(1)] * 4, batch_size=1, sampler=dict(type='DefaultSampler', shuffle=False)
        ),
        train_cfg=dict(by_epoch=False, max_iters=4),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1), checkpoint=None),
        custom_hooks=[dict(type='mmevm.PeakMemoryHook')],
        experiment_name='memory',
    ).train()
    (log,) = tmp_path.glob('*/vis_data/scalars.json')
    memory = [json.loads(line)['memory'] for line in log.read_text().splitlines()]
    assert len(memory) == 4
    assert memory == sorted(memory)
    assert memory[-1] == pytest.approx(peak_of_this_process(), rel=0.03)


def logged():
    hub = MessageHub('peak memory')
    peak_memory.PeakMemoryHook().after_train_iter(SimpleNamespace(message_hub=hub))
    return hub.log_scalars['train/memory'].current() if hub.log_scalars else None


@pytest.mark.parametrize(('platform', 'megabytes'), [('linux', 3072), ('darwin', 3)])
def test_unit_of_ru_maxrss_on_linux_and_macos(monkeypatch, platform, megabytes):
    usage = SimpleNamespace(ru_maxrss=3 * 2**20)
    resource = SimpleNamespace(getrusage=lambda who: usage, RUSAGE_SELF=0)
    monkeypatch.setattr(peak_memory, 'resource', resource)
    monkeypatch.setattr(sys, 'platform', platform)
    assert logged() == megabytes


def test_nothing_is_logged_without_module_resource(monkeypatch):
    monkeypatch.setattr(peak_memory, 'resource', None)
    assert logged() is None


def test_package_imports_without_modules_that_windows_lacks(tmp_path):
    code = """
import os, signal, sys
import torch, mmengine.hooks, mmengine.runner  # import some of these modules
for name in ('resource', 'fcntl', 'pwd', 'grp', 'termios'):
    sys.modules[name] = None
for module, names in ((os, ('O_DIRECTORY', 'fork', 'sched_getaffinity')), (signal, ('sigwaitinfo', 'pthread_sigmask'))):
    for name in names:
        delattr(module, name)
import pkgutil, importlib, mmevm
for module in pkgutil.walk_packages(mmevm.__path__, 'mmevm.'):
    importlib.import_module(module.name)
from mmevm.engine import AtomicBackend
from mmevm.engine.loops import init_worker
AtomicBackend().put(b'1', 'epoch_1.pth')
init_worker(0)
"""
    succeed('-c', code, cwd=tmp_path)
    assert (tmp_path / 'epoch_1.pth').read_bytes() == b'1'
