from importlib.metadata import version

import torch
from command_line import ROOT, succeed

import mmevm


def test_versions_operators_and_device(tmp_path):
    output = succeed('-m', 'mmevm.env', cwd=tmp_path)
    lines = dict(line.split(': ', 1) for line in output.splitlines() if ': ' in line)
    assert lines['mmevm'] == f'{mmevm.__version__} ({ROOT / "mmevm"})'
    assert lines['torch'] == version('torch')
    distributions = [lines['OpenMMLab packages (onedl)'], lines['OpenMMLab packages (openmmlab)']]
    assert distributions.count('none') == 1
    assert 'mmcv' in lines['mmcv operators']
    assert lines['device'].startswith(f'CPU ({torch.backends.cpu.get_cpu_capability()}')
