"""What is written where, with an inferencer that needs no model."""

import json

import cv2
import numpy as np
import pytest

from mmevm.errors import ConfigError, UserError
from mmevm.inference import Inputs, Predictor, predictor


class MeanInferencer:
    """'Predicts' the mean of an image, and draws by inverting it."""

    def __init__(self):
        self.batches = []

    def read(self, source):
        image = cv2.imread(source)
        if image is None:
            raise OSError('no image')
        return image

    def infer(self, images, draw, score_thr):
        self.batches.append(len(images))
        return [(dict(mean=round(float(image.mean()))), 255 - image if draw else None) for image in images]


@pytest.fixture
def inferencer():
    return MeanInferencer()


def write(path, value=10):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((32, 32, 3), value, np.uint8))
    return str(path)


def write_clip(path, num_frames=5):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'mp4v'), 10, (64, 48))
    for i in range(num_frames):
        writer.write(np.full((48, 64, 3), 40 * i, np.uint8))
    writer.release()
    return str(path)


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())


def test_pictures_and_json_files(tmp_path, inferencer):
    paths = [write(tmp_path / f'{i}.png', 10 * i) for i in range(5)]
    count = Predictor(inferencer, tmp_path / 'out', batch_size=2).run(Inputs(paths))
    assert count == 5
    assert inferencer.batches == [2, 2, 1]
    assert written(tmp_path / 'out') == [
        f'{kind}/{i}.{end}' for kind, end in (('preds', 'json'), ('vis', 'png')) for i in range(5)
    ]
    for i in range(5):
        assert json.loads((tmp_path / f'out/preds/{i}.json').read_text()) == dict(mean=10 * i)
        assert (cv2.imread(str(tmp_path / f'out/vis/{i}.png')) == 255 - 10 * i).all()


def test_no_save_vis_writes_json_files_only(tmp_path, inferencer):
    inputs = Inputs([write(tmp_path / 'a.png')], [write_clip(tmp_path / 'clip.mp4', 1)])
    Predictor(inferencer, tmp_path / 'out', save_vis=False).run(inputs)
    assert written(tmp_path / 'out') == ['preds/a.json', 'preds/clip/000000.json']


def test_images_of_the_same_name_are_all_kept(tmp_path, inferencer, capfd):
    names = ['x/a.png', 'y/a.png', 'y/A.jpg', 'y/a_2.png']
    Predictor(inferencer, tmp_path / 'out').run(Inputs([write(tmp_path / name) for name in names]))
    stems = ['a', 'a_2', 'A_3', 'a_2_2']
    assert written(tmp_path / 'out') == sorted(
        [*(f'preds/{stem}.json' for stem in stems), 'vis/a.png', 'vis/a_2.png', 'vis/A_3.jpg', 'vis/a_2_2.png']
    )
    assert f'{tmp_path}/y/a.png: written as a_2, because another input is called a too.' in capfd.readouterr().err


def test_unreadable_images_are_named_and_skipped(tmp_path, inferencer, capfd):
    (tmp_path / 'broken.png').write_text('no image')
    paths = [str(tmp_path / 'broken.png'), write(tmp_path / 'a.png')]
    predict = Predictor(inferencer, tmp_path / 'out')
    assert predict.run(Inputs(paths, [str(tmp_path / 'broken.png')])) == 1
    assert predict.skipped == [paths[0], paths[0]]
    assert written(tmp_path / 'out') == ['preds/a.json', 'vis/a.png']
    assert f'Skipped {paths[0]}: it cannot be read (OSError: no image).' in capfd.readouterr().err


def test_extension_that_cannot_be_written_becomes_png(tmp_path, inferencer):
    path = tmp_path / 'a.unknown'
    write(tmp_path / 'a.png')
    (tmp_path / 'a.png').rename(path)
    Predictor(inferencer, tmp_path / 'out').run(Inputs([str(path)]))
    assert written(tmp_path / 'out') == ['preds/a.json', 'vis/a.png']


def test_video(tmp_path, inferencer):
    clip = write_clip(tmp_path / 'clip.mp4')
    assert Predictor(inferencer, tmp_path / 'out', batch_size=2).run(Inputs(videos=[clip])) == 5
    assert inferencer.batches == [2, 2, 1]
    capture = cv2.VideoCapture(str(tmp_path / 'out/vis/clip.mp4'))
    assert capture.get(cv2.CAP_PROP_FPS) == 10
    for i in range(5):
        assert abs(capture.read()[1].mean() - (255 - 40 * i)) < 5
        mean = json.loads((tmp_path / f'out/preds/clip/{i:06d}.json').read_text())['mean']
        assert abs(mean - 40 * i) < 5
    assert not capture.read()[0]


def test_video_that_ends_early_is_reported(tmp_path, inferencer, capfd):
    path = tmp_path / 'clip.avi'
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'MJPG'), 10, (64, 48))
    for _ in range(20):
        writer.write(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    writer.release()
    Predictor(inferencer, tmp_path / 'whole').run(Inputs(videos=[str(path)]))
    assert 'it ended' not in capfd.readouterr().err
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    count = Predictor(inferencer, tmp_path / 'cut').run(Inputs(videos=[str(path)]))
    assert 0 < count < 20
    assert f'{path}: it ended after {count} of about 20 frames.' in capfd.readouterr().err


def test_folder_that_cannot_be_created(tmp_path, inferencer):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match=r'--out-dir .*file/out cannot be created: .*Give another folder'):
        Predictor(inferencer, tmp_path / 'file/out')


class Camera:
    """Gives a few frames, then what a user's Ctrl-C raises."""

    def __init__(self, index):
        self.frames = 3

    def isOpened(self):
        return True

    def get(self, prop):
        return 0

    def read(self):
        if not self.frames:
            raise KeyboardInterrupt
        self.frames -= 1
        return True, np.zeros((48, 64, 3), np.uint8)

    def release(self):
        pass


def test_camera_is_recorded_until_interrupted(tmp_path, inferencer, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cv2, 'VideoCapture', Camera)
        assert Predictor(inferencer, tmp_path / 'out', batch_size=2).run(Inputs(videos=[0])) == 3
    assert inferencer.batches == [1, 1, 1]
    assert cv2.VideoCapture(str(tmp_path / 'out/vis/camera_0.mp4')).get(cv2.CAP_PROP_FRAME_COUNT) == 3


def test_show_ends_with_q(tmp_path, inferencer, monkeypatch):
    shown, keys = [], iter([-1, ord('q')])
    monkeypatch.setattr(predictor, '_check_display', lambda: None)
    monkeypatch.setattr(cv2, 'imshow', lambda title, picture: shown.append(picture))
    monkeypatch.setattr(cv2, 'waitKey', lambda wait: next(keys))
    inputs = Inputs([write(tmp_path / f'{i}.png') for i in range(4)], [write_clip(tmp_path / 'clip.mp4')])
    assert Predictor(inferencer, tmp_path / 'out', save_vis=False, show=True).run(inputs) == 2
    assert len(shown) == 2


def test_show_needs_a_display(tmp_path, inferencer, monkeypatch):
    monkeypatch.setattr('sys.platform', 'linux')
    monkeypatch.delenv('DISPLAY', raising=False)
    monkeypatch.delenv('WAYLAND_DISPLAY', raising=False)
    with pytest.raises(ConfigError, match='--show: this machine has no display'):
        Predictor(inferencer, tmp_path, show=True)


def test_show_needs_windows_in_opencv(tmp_path, inferencer, monkeypatch):
    def fail(*_):
        raise cv2.error('not implemented')

    monkeypatch.setenv('DISPLAY', ':0')
    monkeypatch.setattr(cv2, 'namedWindow', fail)
    with pytest.raises(ConfigError, match='opencv-python-headless'):
        Predictor(inferencer, tmp_path, show=True)
