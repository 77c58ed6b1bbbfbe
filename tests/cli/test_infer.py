"""tools/infer.py and ``python -m mmevm`` as a user starts them."""

import functools
import http.server
import json
import shutil
import sys
import threading

import cv2
import numpy as np
import pytest
from command_line import ROOT, error_line, run, run_here, succeed
from tiny_models import DIGITS, write_classifier, write_detector

from mmevm import __main__ as command

TOOL = ROOT / 'tools/infer.py'


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    return write_detector(tmp_path_factory.mktemp('detector'), dataset_meta=dict(classes=('disc', 'box')))


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for name in ('a.png', 'b.jpg'):
        image = cv2.resize(rng.integers(0, 255, (8, 8, 3), np.uint8), (96, 64), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / name), image)
    writer = cv2.VideoWriter(str(folder / 'clip.mp4'), cv2.VideoWriter.fourcc(*'mp4v'), 10, (96, 64))
    for _ in range(3):
        writer.write(image)
    writer.release()
    return folder


@pytest.fixture
def server(images):
    """Address of an HTTP server for the images, without byte ranges."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Handler, directory=images)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


@pytest.mark.slow
def test_folder_with_an_unreadable_image(detector, images, tmp_path):
    shutil.copytree(images, tmp_path / 'in')
    (tmp_path / 'in/broken.jpg').write_bytes((images / 'b.jpg').read_bytes()[:300])
    result = run('-m', 'mmevm', 'infer', *detector, 'in', '--deploy', '--batch-size', 2, cwd=tmp_path)
    assert error_line(result).startswith('UserError: 1 of 4 inputs could not be read and were skipped: in/broken.jpg')
    assert 'Skipped in/broken.jpg: it cannot be read' in result.stderr
    assert 'Images ' in result.stderr
    assert '3/3' in result.stderr
    assert written(tmp_path / 'outputs') == [
        *('preds/a.json', 'preds/b.json', *(f'preds/clip/{i:06d}.json' for i in range(3))),
        *('vis/a.png', 'vis/b.jpg', 'vis/clip.mp4'),
    ]
    result = json.loads((tmp_path / 'outputs/preds/a.json').read_text())
    assert result.keys() == {'bboxes', 'labels', 'masks', 'scores', 'class_names'}
    assert set(result['class_names']) <= {'disc', 'box'}


def test_urls(detector, images, server, tmp_path, monkeypatch):
    out = tmp_path / 'out'
    inputs = [f'{server}/b.jpg?size=3', f'{server}/clip.mp4', str(images / 'b*')]
    run_here(monkeypatch, TOOL, *detector, *inputs, '--out', out, '--device', 'cpu')
    assert written(out) == [
        *('preds/b.json', 'preds/b_2.json', *(f'preds/clip/{i:06d}.json' for i in range(3))),
        *('vis/b.jpg', 'vis/b_2.jpg', 'vis/clip.mp4'),
    ]
    assert (out / 'preds/b.json').read_text() == (out / 'preds/b_2.json').read_text()


def test_url_that_cannot_be_fetched(detector, server, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        run_here(monkeypatch, TOOL, *detector, f'{server}/none.jpg', '--out-dir', tmp_path, '--device', 'cpu')
    assert '1 of 1 inputs could not be read' in str(stopped.value)
    assert not written(tmp_path)


def test_image_without_objects_is_no_error(detector, images, tmp_path, monkeypatch):
    options = ['--cfg-options', 'model.test_cfg.rcnn.score_thr=1.0']
    run_here(monkeypatch, TOOL, *detector, images / 'a.png', '--out', tmp_path, '--device', 'cpu', *options)
    found = json.loads((tmp_path / 'preds/a.json').read_text())
    assert found['bboxes'] == found['scores'] == found['labels'] == found['class_names'] == []
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / 'vis/a.png')), cv2.imread(str(images / 'a.png')))


def test_classifier(images, tmp_path, monkeypatch):
    files = write_classifier(tmp_path)
    run_here(monkeypatch, TOOL, *files, images, '--out', tmp_path / 'out', '--device', 'cpu', '--deploy')
    found = json.loads((tmp_path / 'out/preds/a.json').read_text())
    assert found.keys() == {'pred_scores', 'pred_label', 'pred_score', 'pred_class'}
    assert found['pred_class'] == DIGITS[found['pred_label']]
    assert cv2.imread(str(tmp_path / 'out/vis/a.png')).shape == (224, 336, 3)
    assert cv2.VideoCapture(str(tmp_path / 'out/vis/clip.mp4')).get(cv2.CAP_PROP_FRAME_COUNT) == 3


@pytest.mark.parametrize('options', [['--batch-size', '0'], ['--score-thr', '30']])
def test_options_out_of_range(options, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_here(monkeypatch, TOOL, 'config.py', 'checkpoint.pth', 'a.jpg', *options)
    assert f'{options[0]} {options[1]}' in capsys.readouterr().err.replace('.0:', ':')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['config.py', 'checkpoint.pth'], 'INPUT is missing'),
        (['model.onnx', 'a.jpg', '--deploy'], '--deploy and --cfg-options: give them to tools/export_onnx.py'),
        (['model.onnx'], 'the following arguments are required'),
        (
            ['--cfg-options', 'a=1', 'config.py', 'b.pth', 'a.jpg'],
            'config.py: expected key=value. Put --cfg-options after',
        ),
    ],
)
def test_wrong_arguments(arguments, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_here(monkeypatch, TOOL, *arguments)
    assert message in capsys.readouterr().err


def test_missing_input_is_found_before_the_model_is_built(monkeypatch):
    with pytest.raises(SystemExit, match=r'ConfigError: INPUT none\.jpg: there is no such file'):
        run_here(monkeypatch, TOOL, 'config.py', 'checkpoint.pth', 'none.jpg')


def test_every_command_has_its_tool():
    for name in command.COMMANDS.values():
        assert (command.tools_dir() / name).is_file()


def test_tools_of_a_wheel_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(command, '__file__', str(tmp_path / 'mmevm/__main__.py'))
    assert command.tools_dir() == tmp_path / 'tools'
    (tmp_path / 'mmevm/.mim/tools').mkdir(parents=True)
    assert command.tools_dir() == tmp_path / 'mmevm/.mim/tools'


@pytest.mark.parametrize('arguments', [[], ['fly']])
def test_unknown_command(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['mmevm', *arguments])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    assert 'usage: python -m mmevm {train,test,infer' in capsys.readouterr().err


def test_arguments_are_passed_on(monkeypatch, capsys):
    monkeypatch.setattr(
        sys, 'argv', ['mmevm', 'flops', ROOT / 'configs/classification/efficientvim-m1_300e_in1k.py', '--shape', '-1']
    )
    sys.argv = [str(word) for word in sys.argv]
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert 'error: --shape' in printed
    assert 'usage: python -m mmevm flops' in printed


def test_every_tool_for_users_is_a_command():
    others = {'demo.py', 'make_digits.py', 'make_shapes.py'}  # for the Makefile
    assert set(command.COMMANDS.values()) | others == {path.name for path in (ROOT / 'tools').glob('*.py')}


@pytest.mark.slow
def test_python_m_mmevm(tmp_path):
    assert '--score-thr' in succeed('-m', 'mmevm', 'infer', '--help', cwd=tmp_path)
