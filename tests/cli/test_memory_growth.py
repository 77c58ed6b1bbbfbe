import importlib.util
import json
import mmap

import numpy as np
import pytest
import torch
from command_line import ROOT, error_line, run

TOOL = ROOT / 'benchmarks/memory_growth.py'


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location(TOOL.stem, TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_fit_ignores_single_peaks(tool):
    """100 MB are filled during the warm-up, then 0.02 MB per step, with occasional large images."""
    steps = np.arange(400)
    readings = 300 + np.minimum(steps, 100) + 0.02 * np.maximum(steps - 100, 0)
    readings[150::50] += 80
    summary = tool.summarize(readings.tolist(), warm_up=100)
    assert summary['megabytes_after_warm_up'] == pytest.approx(400, abs=1)
    assert summary['megabytes_per_1000'] == pytest.approx(20, abs=1)
    assert summary['growth_percent'] == pytest.approx(100 * 0.02 * 299 / 400, abs=0.1)
    assert summary['readings'][0] == [0, 300]
    assert summary['readings'][-1][0] == 399


@pytest.mark.parametrize('megabytes', [1, 0])
def test_memory_kept_by_each_call_is_measured(tool, megabytes):
    kept = []

    def call(height, width):
        torch.ones(height, width, 100)  # freed
        # from the system, as malloc may reuse memory of earlier tests
        kept.append(mmap.mmap(-1, 1_000_000))
        kept[-1].write(bytes(1_000_000 * megabytes))

    summary = tool.summarize(tool.infer(call, steps=100), warm_up=25)
    assert summary['megabytes_per_1000'] == pytest.approx(1000 * megabytes, abs=200)


@pytest.mark.slow
def test_measures_training_and_inference(tmp_path):
    file = tmp_path / 'growth.json'
    arguments = ['--share', 0.05, '--allowed', 50, '--json', file, '--cases', 'training', 'deployed backbone']
    result = run(TOOL, *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    content = json.loads(file.read_text())
    assert content['environment']['versions']['torch'] == torch.__version__
    results = content['results']
    assert [(result['case'], result['warm_up'], result['steps'], len(result['readings'])) for result in results] == [
        ('training', 15, 15, 30),
        ('deployed backbone', 100, 100, 100),
    ]
    for result in results:
        assert 100 < result['megabytes_after_warm_up'] < 8000
        assert all(100 < megabytes < 8000 for _, megabytes in result['readings'])


@pytest.mark.slow
def test_exits_with_1_if_growth_exceeds_the_limit(tmp_path):
    result = run(TOOL, '--share', 0.01, '--allowed', -100, '--cases', 'backbone', cwd=tmp_path)
    assert error_line(result) == 'Memory grows by more than -100 %: backbone.'
