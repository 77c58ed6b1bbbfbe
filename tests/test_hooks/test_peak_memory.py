import json
from pathlib import Path

import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner


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


def test_peak_memory_is_logged_and_is_what_the_kernel_says(tmp_path):
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
