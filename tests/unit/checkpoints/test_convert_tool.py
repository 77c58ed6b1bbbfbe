"""Run tools/convert_checkpoint.py."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_formats import assert_same, authors_file, timm_state
from safetensors.torch import save_file

from mmevm.checkpoints import CheckpointError, convert_checkpoint

ROOT = Path(__file__).parents[3]
NAME = 'efficientvim_m1.e450_in1k'


def run_tool(*args: str | Path, **env: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', **env}
    command = [sys.executable, ROOT / 'tools' / 'convert_checkpoint.py', *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_tool_downloads_and_converts(server, tmp_path):
    repo = server.folder / 'timm' / NAME / 'resolve' / 'main'
    repo.mkdir(parents=True)
    save_file(timm_state('efficientvim_m1'), repo / 'model.safetensors')
    target = tmp_path / 'new' / 'm1.pth'
    done = run_tool(f'timm://{NAME}', target, HF_ENDPOINT=server.url, HF_HOME=str(tmp_path / 'hf'), HF_HUB_OFFLINE='0')
    assert done.returncode == 0, done.stderr
    assert 'EfficientViM-M1' in done.stdout
    written = torch.load(target, weights_only=True)
    assert_same(written['state_dict'], convert_checkpoint(timm_state('efficientvim_m1'))[0]['state_dict'])
    assert written['meta']['source'] == "a classifier in timm's layout"
    assert os.listdir(target.parent) == ['m1.pth']


def test_tool_prints_errors_in_one_line(tmp_path):
    target = tmp_path / 'old.pth'
    target.write_text('old content')
    state = timm_state('efficientvim_m1')
    torch.save({**state, 'surprise': torch.ones(1)}, tmp_path / 'x.pth')
    done = run_tool(tmp_path / 'x.pth', target)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith('CheckpointError: ')
    assert 'surprise' in done.stderr
    assert 'Traceback' not in done.stderr
    assert target.read_text() == 'old content'
    assert sorted(os.listdir(tmp_path)) == ['old.pth', 'x.pth']


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location('convert_checkpoint', ROOT / 'tools' / 'convert_checkpoint.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(('weights', 'seed'), [([], 1), (['--weights', 'ema'], 1), (['--weights', 'model'], 0)])
def test_tool_converts_the_chosen_weights_and_prints_a_report(tool, tmp_path, monkeypatch, capsys, weights, seed):
    source = authors_file(tmp_path / 'x.pth')
    monkeypatch.setattr(sys, 'argv', ['convert_checkpoint.py', str(source), str(tmp_path / 'y.pth'), *weights])
    tool.main()
    state = timm_state('efficientvim_m1', seed)
    assert_same(
        torch.load(tmp_path / 'y.pth', weights_only=True)['state_dict'], convert_checkpoint(state)[0]['state_dict']
    )
    printed = capsys.readouterr().out
    assert f'converted: {len(state)} tensors' in printed
    assert 'patch_embed.* -> backbone.patch_embed.* (24)' in printed
    assert 'heads.* -> head.heads.* (8)' in printed
    for entry in ('optimizer', 'config', 'args', 'epoch'):
        assert f'\n  {entry}: ' in printed


def test_tool_reports_a_failed_write(tool, tmp_path, monkeypatch):
    source = authors_file(tmp_path / 'x.pth')
    monkeypatch.setattr(sys, 'argv', ['convert_checkpoint.py', str(source), str(tmp_path / 'full' / 'y.pth')])
    (tmp_path / 'full').write_text('a file where a folder is needed')
    with pytest.raises(CheckpointError, match=r'File exists|Not a directory'):
        tool.main()
    shutil.copy(source, tmp_path / 'full')  # the file is unchanged
