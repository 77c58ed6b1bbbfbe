import importlib.util
import json
import mmap

import numpy as np
import pytest
import torch
from command_line import ROOT, run, the_sentence

TOOL = ROOT / 'benchmarks/memory_growth.py'


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location(TOOL.stem, TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_line_passes_by_single_peaks(tool):
    """100 MB that fill in the warm-up, then 0.02 MB a step from 400 MB on, and large images now and then."""
    steps = np.arange(400)
    readings = 300 + np.minimum(steps, 100) + 0.02 * np.maximum(steps - 100, 0)
    readings[150::50] += 80
    summary = tool.summarise(readings.tolist(), warm_up=100)
    assert summary['megabytes_after_warm_up'] == pytest.approx(400, abs=1)
    assert summary['megabytes_per_1000'] == pytest.approx(20, abs=1)
    assert summary['growth_percent'] == pytest.approx(100 * 0.02 * 299 / 400, abs=0.1)
    assert summary['readings'][0] == [0, 300]
    assert summary['readings'][-1][0] == 399


@pytest.mark.parametrize(('megabytes', 'of_each_step'), [(1, 1), (0, 0)])
def test_what_a_call_keeps_is_seen(tool, megabytes, of_each_step):
    kept = []

    def call(height, width):
        torch.ones(height, width, 100)  # which is given back
        # From the system itself: malloc would first take what earlier tests have left to it.
        kept.append(mmap.mmap(-1, 1_000_000))
        kept[-1].write(bytes(1_000_000 * megabytes))

    summary = tool.summarise(tool.infer(call, steps=100), warm_up=25)
    assert summary['megabytes_per_1000'] == pytest.approx(1000 * of_each_step, abs=200)


@pytest.mark.slow
def test_training_and_inference(tmp_path):
    file = tmp_path / 'growth.json'
    arguments = ['--share', 0.05, '--allowed', 50, '--json', file, '--subjects', 'training', 'deployed backbone']
    result = run(TOOL, *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    content = json.loads(file.read_text())
    assert content['environment']['versions']['torch'] == torch.__version__
    results = content['results']
    assert [(result['subject'], result['warm_up'], result['steps'], len(result['readings'])) for result in results] == [
        ('training', 15, 15, 30),
        ('deployed backbone', 100, 100, 100),
    ]
    for subject in results:
        assert 100 < subject['megabytes_after_warm_up'] < 8000
        assert all(100 < megabytes < 8000 for _, megabytes in subject['readings'])


@pytest.mark.slow
def test_growth_above_what_is_allowed_ends_with_1(tmp_path):
    result = run(TOOL, '--share', 0.01, '--allowed', -100, '--subjects', 'backbone', cwd=tmp_path)
    assert the_sentence(result) == 'Memory grows by more than -100 %: backbone.'
