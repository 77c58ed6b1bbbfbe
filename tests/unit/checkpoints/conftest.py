"""Fixtures of the checkpoint tests: a web server, and the places that read a file."""

import http.server
import threading
import types
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from command_line import ROOT, run_here
from foreign_files import CONFIG, ENVIRONMENT, Place
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from mmengine.runner import runner
from randomize import randomize

from mmevm.models import EfficientViM


@pytest.fixture
def log(caplog):
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def server(tmp_path):
    """A local web server instead of remote hosts."""
    folder = tmp_path / 'served'
    folder.mkdir()
    requests = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def end_headers(self):
            self.send_header('X-Repo-Commit', '0123456789012345678901234567890123456789')
            self.send_header('ETag', '"0123456789"')
            if not Path(self.translate_path(self.path)).exists():
                self.send_header('X-Error-Code', 'EntryNotFound')
            super().end_headers()

        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield types.SimpleNamespace(url=f'http://127.0.0.1:{httpd.server_port}', folder=folder, requests=requests)
        httpd.shutdown()


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """The config of a small classifier, beside two images of each of its two classes."""
    root = tmp_path_factory.mktemp('data')
    generator = np.random.default_rng(0)
    for split in ('train', 'val'):
        for name in ('a', 'b'):
            (root / split / name).mkdir(parents=True)
            for i in range(2):
                cv2.imwrite(str(root / split / name / f'{i}.png'), generator.integers(0, 256, (64, 64, 3), np.uint8))
    path = root / 'tiny.py'
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope='module')
def state(config):
    """State dict of the small classifier with random weights."""
    model = Config.fromfile(config).model
    return randomize(MODELS.build(dict(model, _scope_='mmpretrain'))).state_dict()


@pytest.fixture(scope='module')
def backbone_state():
    """State dict of a backbone that convert_checkpoint recognizes."""
    return {f'backbone.{name}': tensor for name, tensor in randomize(EfficientViM('m1')).state_dict().items()}


@pytest.fixture(scope='module')
def trained(config, tmp_path_factory):
    """Checkpoint after an epoch of training."""
    work_dir = tmp_path_factory.mktemp('trained')
    with pytest.MonkeyPatch.context() as monkeypatch:
        options = ['--work-dir', work_dir, '--data-root', config.parent]
        run_here(monkeypatch, ROOT / 'tools/train.py', config, *options)
    return torch.load(work_dir / 'epoch_1.pth', weights_only=False)


@pytest.fixture
def place(config, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, 'collect_env', ENVIRONMENT)
    return Place(config, monkeypatch, tmp_path)


@pytest.fixture
def content(request, name):
    """Valid content of a file for a place."""
    fixture = dict(convert='backbone_state', resume='trained').get(name, 'state')
    value = request.getfixturevalue(fixture)
    return value if name == 'resume' else {'state_dict': value, 'meta': {}}
