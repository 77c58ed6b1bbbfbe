"""Find and read images and videos."""

import glob
import http.client
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlparse

import cv2
import mmcv
import mmengine.fileio
import numpy as np

from mmevm.errors import ConfigError

IMAGE_EXTENSIONS = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif', '.tiff', '.webp')  # as in DetInferencer
VIDEO_EXTENSIONS = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg', '.wmv')

# What reading a damaged file or an unreachable URL raises in mmcv, mmengine and OpenCV.
READ_ERRORS = (AssertionError, OSError, ValueError, cv2.error, http.client.HTTPException)


@dataclass
class Inputs:
    """Images and videos, in the order in which they were named and without repetitions.

    Attributes:
        images: Paths and URLs.
        videos: Paths and URLs; an integer is the index of a camera.
    """

    images: list[str] = field(default_factory=list)
    videos: list[str | int] = field(default_factory=list)


def find_inputs(names: Sequence[str]) -> Inputs:
    """Expand folders and glob patterns, and separate images from videos.

    Args:
        names: Image files, video files, folders (images and videos directly in them), glob patterns (``**`` matches
            subfolders), camera indices and http(s) URLs.

    Raises:
        ConfigError: If a file does not exist, or a folder or pattern has no image and no video.
    """
    inputs = Inputs()
    for name in names:
        if name.isdecimal() and not os.path.exists(name):
            inputs.videos.append(int(name))
            continue
        for path in _expand(name):
            (inputs.videos if _extension(path) in VIDEO_EXTENSIONS else inputs.images).append(path)
    inputs.images, inputs.videos = list(dict.fromkeys(inputs.images)), list(dict.fromkeys(inputs.videos))
    return inputs


def is_url(name: str) -> bool:
    """Return whether an input is an http(s) URL."""
    return name.startswith(('http://', 'https://'))


def file_name(source: str | int) -> str:
    """Return the name of an image or video without its folders and without the query of a URL."""
    if isinstance(source, int):
        return f'camera_{source}'
    return Path(urlparse(source).path if is_url(source) else source).name or 'image'


def _extension(name: str) -> str:
    return Path(file_name(name)).suffix.lower()


def _expand(name: str) -> list[str]:
    if is_url(name) or os.path.isfile(name):
        return [name]
    if os.path.isdir(name):
        paths, kind = [os.path.join(name, file) for file in os.listdir(name)], 'folder'
    elif glob.has_magic(name):
        paths, kind = glob.glob(os.path.expanduser(name), recursive=True), 'pattern'
    else:
        raise ConfigError(
            f'INPUT {name}: there is no such file or folder ({os.path.abspath(name)}). Give an image, a video, a '
            'folder, a quoted glob pattern, a camera index or an http(s) URL.'
        )
    known = IMAGE_EXTENSIONS + VIDEO_EXTENSIONS
    files = sorted(path for path in paths if os.path.isfile(path) and _extension(path) in known)
    if not files:
        hint = ' Subfolders are not searched; a quoted pattern such as "DIR/**/*.jpg" does that.' * (kind == 'folder')
        raise ConfigError(
            f'INPUT {name}: {len(paths)} entries of this {kind}, none of them a file that ends in one of '
            f'{" ".join(known)}.{hint}'
        )
    return files


def read_image(source: str) -> np.ndarray:
    """Read an image from a path or URL: (H, W, 3) uint8 in BGR.

    Raises:
        OSError: If it cannot be read.
    """
    image = mmcv.imread(source)
    if image is None:
        raise OSError('it is not an image, or is damaged')
    return image


@dataclass
class Video:
    """An open video.

    Attributes:
        frames: Its frames, (H, W, 3) uint8 in BGR.
        fps: Frames per second.
        total: Number of frames; None if it is not known.
    """

    frames: Iterator[np.ndarray]
    fps: float
    total: int | None


@contextmanager
def open_video(source: str | int) -> Iterator[Video]:
    """Open a video file, a URL of one, or a camera.

    Raises:
        OSError: If it cannot be opened, or downloaded.
    """
    if isinstance(source, int):
        capture = cv2.VideoCapture(source)
        try:
            if not capture.isOpened():
                raise OSError('OpenCV cannot open this camera')
            yield Video(_camera_frames(capture), capture.get(cv2.CAP_PROP_FPS) or 25, None)
        finally:
            capture.release()
        return
    # OpenCV can open URLs, but not seek in them on servers without byte ranges, which most videos need.
    with mmengine.fileio.get_local_path(source) as path, mmcv.VideoReader(str(path)) as reader:
        if not reader.opened or not reader.width:
            raise OSError('OpenCV cannot open this video')
        total = reader.frame_cnt if reader.frame_cnt > 0 else None
        # A generator, because each iter(reader) goes back to the first frame.
        yield Video((frame for frame in reader), reader.fps or 25, total)


def _camera_frames(capture: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while True:
        is_read, frame = capture.read()
        if not is_read:
            return
        yield frame
