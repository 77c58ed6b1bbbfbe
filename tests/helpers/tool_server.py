"""Run tools in processes forked from one that has imported their packages, which takes seconds.

The server answers requests, each a line of JSON. A forked process has its own working directory, environment, arguments
and output. Of mmevm, only ``import mmevm`` was done before.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import model_index
from mmengine.config import Config

PACKAGES = [
    *('mmevm', 'mmengine.runner', 'timm', 'mmdet.models', 'mmdet.datasets', 'mmdet.evaluation', 'mmdet.engine'),
    *('mmdet.visualization', 'mmpretrain.models', 'mmpretrain.datasets', 'mmpretrain.evaluation', 'mmpretrain.engine'),
]


class Tool:
    """A running tool, with methods of ``subprocess.Popen``. It appends its output to files."""

    def __init__(self, *arguments, cwd, env, stdout, stderr):
        self.returncode = None
        self.args = list(map(str, arguments))
        self.pid = _request(start=self.args, cwd=str(cwd), env=env, files=[str(stdout), str(stderr)])

    def poll(self):
        if self.returncode is None:
            self.returncode = _request(poll=self.pid)
        return self.returncode

    def wait(self, timeout):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                os.killpg(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)


@functools.cache
def _start_server():
    env = {name: value for name, value in os.environ.items() if not name.startswith('COVERAGE_')}
    env |= dict(OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    command = [sys.executable, __file__, *sys.path]
    server = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.stdin.close)  # which ends it
    return server


def _request(**content):
    server = _start_server()
    print(json.dumps(content), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


def _serve():
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)  # packages print during import
    for name in PACKAGES:
        importlib.import_module(name)
    model_index.read_once()
    Config.fromfile(Path(__file__).parents[2] / 'configs/demo/maskrcnn_evm_m1_shapes.py')
    gc.freeze()  # collections in the forked processes need not go through all packages
    for line in sys.stdin:
        request = json.loads(line)
        if 'start' in request:
            answer = os.fork()
            if not answer:
                answers.close()
                _run(**request)
        else:
            pid, status = os.waitpid(request['poll'], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), file=answers, flush=True)


def _run(start, cwd, env, files):
    """Become a process that runs a tool."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate(['/dev/null', *files]):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY
        os.dup2(os.open(path, flags), number)
    sys.stdout.reconfigure(line_buffering=True)
    sys.argv = start
    if 'COVERAGE_PROCESS_CONFIG' in env:
        importlib.import_module('coverage').process_startup(force=True)
    status = 0
    try:
        runpy.run_path(start[0], run_name='__main__')
    except SystemExit as exit:
        status = exit.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    # as at the end of a new process
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


if __name__ == '__main__':
    sys.path[:] = sys.argv[1:]
    _serve()
