"""Run command-line tools in separate processes, on the CPU."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tool_server import Tool

ROOT = Path(__file__).parents[2]
ENVIRONMENT = dict(
    PYTHONPATH=os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]),
    OMP_NUM_THREADS='1',
    CUDA_VISIBLE_DEVICES='',
)


def run(*arguments, cwd, **environment):
    """Run Python. A tool of the repository runs in a process that has already imported its packages."""
    first = arguments[0]
    if isinstance(first, Path) and first.parent == ROOT / 'tools' and not environment:
        return _run_tool(arguments, cwd)
    command = [sys.executable, *map(str, arguments)]
    environment = os.environ | ENVIRONMENT | environment
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def _run_tool(arguments, cwd):
    with TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, 'stdout'), Path(folder, 'stderr')
        tool = Tool(*arguments, cwd=cwd, env=os.environ | ENVIRONMENT, stdout=stdout, stderr=stderr)
        tool.wait(300)
        return subprocess.CompletedProcess(arguments, tool.returncode, stdout.read_text(), stderr.read_text())


def succeed(*arguments, cwd, **environment):
    result = run(*arguments, cwd=cwd, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def run_here(monkeypatch, tool, *arguments):
    """Run a tool in this process, which saves the time of its imports."""
    monkeypatch.setattr(sys, 'argv', [tool.name, *map(str, arguments)])
    runpy.run_path(str(tool), run_name='__main__')


def error_line(result):
    """Return the last line of standard error. The command must exit with 1 and print no traceback."""
    assert result.returncode == 1, result.stdout + result.stderr
    assert 'Traceback' not in result.stderr
    return result.stderr.strip().splitlines()[-1]


def scalars(work_dir):
    """Return the log records of the last run in a work dir: those of training iterations and those of evaluations."""
    path = sorted(work_dir.glob('*/vis_data/scalars.json'))[-1]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if 'loss' in line], [line for line in lines if 'loss' not in line]
