import cv2
import numpy as np
import pytest

from mmevm.errors import ConfigError
from mmevm.inference.inputs import Inputs, file_name, find_inputs, open_video


@pytest.fixture
def folder(tmp_path):
    for name in ('b.JPG', 'a.png', 'notes.txt', 'clip.mp4', 'sub/c.jpg', 'x[1].jpg', 'noextension'):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


def write_clip(path, num_frames=5):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'mp4v'), 10, (64, 48))
    for i in range(num_frames):
        writer.write(np.full((48, 64, 3), 40 * i, np.uint8))
    writer.release()


def test_folder_gives_its_images_and_videos_in_order(folder):
    names = [str(folder / name) for name in ('a.png', 'b.JPG', 'x[1].jpg')]
    assert find_inputs([str(folder)]) == Inputs(names, [str(folder / 'clip.mp4')])


@pytest.mark.parametrize(
    ('pattern', 'names'),
    [('*.png', ['a.png']), ('**/*.jpg', ['sub/c.jpg', 'x[1].jpg']), ('*', ['a.png', 'b.JPG', 'x[1].jpg'])],
)
def test_glob(folder, pattern, names):
    assert find_inputs([f'{folder}/{pattern}']).images == [str(folder / name) for name in names]


def test_files_are_taken_as_named(folder):
    names = [str(folder / name) for name in ('x[1].jpg', 'noextension', 'notes.txt')]
    assert find_inputs(names).images == names


def test_repeated_inputs_are_taken_once(folder):
    found = find_inputs([str(folder / 'b.JPG'), str(folder), str(folder / 'clip.mp4')])
    assert found.images == [str(folder / name) for name in ('b.JPG', 'a.png', 'x[1].jpg')]
    assert found.videos == [str(folder / 'clip.mp4')]


def test_urls_and_cameras():
    urls = ['https://example.com/a.jpg?size=3', 'http://example.com/image']
    found = find_inputs([*urls, '0', 'https://example.com/clip.mp4#t=3'])
    assert found == Inputs(urls, [0, 'https://example.com/clip.mp4#t=3'])


def test_file_with_the_name_of_a_number_is_no_camera(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / '0').touch()
    assert find_inputs(['0']) == Inputs(['0'], [])


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r'INPUT .*none\.jpg: there is no such file'):
        find_inputs([str(tmp_path / 'none.jpg')])


@pytest.mark.parametrize('name', ['sub', '*.bmp'])
def test_folder_or_pattern_without_images_is_an_error(tmp_path, name):
    (tmp_path / 'sub').mkdir()
    with pytest.raises(ConfigError, match='none of them a file that ends in one of'):
        find_inputs([f'{tmp_path}/{name}'])


@pytest.mark.parametrize(
    ('source', 'name'),
    [
        ('some/a.jpg', 'a.jpg'),
        ('https://example.com/x/a.jpg?size=3', 'a.jpg'),
        ('https://example.com/', 'image'),
        (1, 'camera_1'),
    ],
)
def test_file_name(source, name):
    assert file_name(source) == name


def test_open_video_reads_each_frame_once(tmp_path):
    path = tmp_path / 'clip.mp4'
    write_clip(path)
    with open_video(str(path)) as video:
        assert (video.fps, video.total) == (10, 5)
        frames = [next(video.frames), *video.frames]
    assert [round(frame.mean() / 40) for frame in frames] == [0, 1, 2, 3, 4]


def test_open_video_refuses_other_files(tmp_path):
    path = tmp_path / 'clip.mp4'
    path.write_text('no video')
    with pytest.raises(OSError, match='cannot open this video'), open_video(str(path)):
        pass


def test_open_video_refuses_a_missing_camera():
    with pytest.raises(OSError, match='cannot open this camera'), open_video(99):
        pass
