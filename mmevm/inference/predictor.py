"""Run an inferencer over images and videos; write pictures, videos and JSON files."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import cv2
import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from mmevm.errors import ConfigError, UserError

from .inputs import READ_ERRORS, Inputs, file_name, open_video

T = TypeVar('T')
# What goes into the JSON file (a map of classes, `sem_seg`, into a PNG file beside it), and the picture with the
# predictions: (H, W, 3) uint8 in BGR, None if it was not drawn.
Prediction = tuple[dict[str, Any], np.ndarray | None]


class Inferencer(Protocol):
    """What a task needs to be run by :class:`Predictor`."""

    def read(self, source: str) -> np.ndarray:
        """Read an image from a path or URL: (H, W, 3) in BGR."""

    def infer(self, images: list[np.ndarray], draw: bool, score_thr: float) -> list[Prediction]:
        """Predict one batch of images."""


class Predictor:
    """Writes what an inferencer finds, in the layout of DetInferencer.

    An image ``a.jpg`` becomes ``vis/a.jpg`` and ``preds/a.json``; a video ``b.mov`` becomes ``vis/b.mp4`` and one JSON
    file for each frame, ``preds/b/000000.json`` and so on.

    Args:
        inferencer: What :func:`build_inferencer` returns.
        out_dir: Folder of ``vis/`` and ``preds/``.
        score_thr: Objects of lower scores are not drawn; the JSON files hold all.
        batch_size: Number of images, or frames of a video, that the model gets at once.
        save_vis: Whether to write pictures and videos.
        show: Whether to show each picture in a window.

    Attributes:
        skipped: Inputs that could not be read.

    Raises:
        ConfigError: If ``show`` is set and no window can be opened.
        UserError: If the folder cannot be created.
    """

    def __init__(
        self,
        inferencer: Inferencer,
        out_dir: str | os.PathLike,
        *,
        score_thr: float = 0.3,
        batch_size: int = 1,
        save_vis: bool = True,
        show: bool = False,
    ) -> None:
        self.inferencer, self.out_dir = inferencer, Path(out_dir)
        self.score_thr, self.batch_size, self.save_vis, self.show = score_thr, batch_size, save_vis, show
        self.skipped: list[str | int] = []
        self._console = Console(stderr=True)
        self._stems: set[str] = set()
        self._is_stopped = False
        if show:
            _check_display()
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f'--out-dir {out_dir} cannot be created: {error}. Give another folder.') from error

    def run(self, inputs: Inputs) -> int:
        """Predict and write all inputs; name and skip those that cannot be read.

        Returns:
            Number of images and frames that were predicted.
        """
        count = 0
        if inputs.images:
            count += self._run_images(inputs.images)
        for source in inputs.videos:
            if not self._is_stopped:
                count += self._run_video(source)
        return count

    def _run_images(self, sources: Sequence[str]) -> int:
        count = 0
        with self._progress() as progress:
            task = progress.add_task('Images', total=len(sources))
            for chunk in _chunks(sources, self.batch_size):
                read = [(source, image) for source in chunk if (image := self._read(source)) is not None]
                if read:
                    predictions = self._infer([image for _, image in read])
                    for (source, _), (result, picture) in zip(read, predictions, strict=True):
                        stem = self._new_stem(source)
                        _write_result(self.out_dir / 'preds' / f'{stem}.json', result)
                        if picture is not None and self.save_vis:
                            self._write_picture(stem, Path(file_name(source)).suffix, picture)
                        self._show(picture, wait=0)
                    count += len(read)
                progress.advance(task, len(chunk))
                if self._is_stopped:
                    break
        return count

    def _run_video(self, source: str | int) -> int:
        count = 0
        is_camera = isinstance(source, int)
        with ExitStack() as stack:
            try:
                video = stack.enter_context(open_video(source))
            except READ_ERRORS as error:
                self._skip(source, error)
                return 0
            stem = self._new_stem(source)
            progress = stack.enter_context(self._progress())
            task = progress.add_task(file_name(source), total=video.total)
            write = stack.enter_context(_video_writer(self.out_dir / 'vis' / f'{stem}.mp4', video.fps))
            if is_camera:
                stack.enter_context(suppress(KeyboardInterrupt))  # Ctrl-C is how a recording ends
            for frames in _chunks(video.frames, 1 if is_camera else self.batch_size):
                for result, picture in self._infer(frames):
                    _write_result(self.out_dir / 'preds' / stem / f'{count:06d}.json', result)
                    if picture is not None and self.save_vis:
                        write(picture)
                    self._show(picture, wait=1)
                    count += 1
                progress.advance(task, len(frames))
                if self._is_stopped:
                    break
        if not count:
            self._skip(source, OSError('OpenCV cannot read any frame of it'))
        # Some formats store the duration, which may be that of a longer audio track.
        elif video.total and count < 0.9 * video.total and not self._is_stopped:
            self._print(f'{source}: it ended after {count} of about {video.total} frames. The file may be damaged.')
        return count

    def _read(self, source: str) -> np.ndarray | None:
        try:
            return self.inferencer.read(source)
        except READ_ERRORS as error:
            self._skip(source, error)
            return None

    def _skip(self, source: str | int, error: Exception) -> None:
        self.skipped.append(source)
        name = f'camera {source}' if isinstance(source, int) else source
        self._print(f'Skipped {name}: it cannot be read ({type(error).__name__}: {" ".join(str(error).split())}).')

    def _infer(self, images: list[np.ndarray]) -> list[Prediction]:
        return self.inferencer.infer(images, draw=self.save_vis or self.show, score_thr=self.score_thr)

    def _new_stem(self, source: str | int) -> str:
        """Return the name of an input's output files, and make sure that no other input has the same."""
        name = Path(file_name(source)).stem
        stem, number = name, 1
        while stem.lower() in self._stems:  # file systems that ignore case exist
            number += 1
            stem = f'{name}_{number}'
        self._stems.add(stem.lower())
        if stem != name:
            self._print(f'{source}: written as {stem}, because another input is called {name} too.')
        return stem

    def _write_picture(self, stem: str, extension: str, picture: np.ndarray) -> None:
        if not extension or not cv2.haveImageWriter(f'_{extension}'):
            extension = '.png'
        path = self.out_dir / 'vis' / f'{stem}{extension}'
        path.parent.mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(str(path), picture):
            raise UserError(f'{path} cannot be written. Free space on the disk, or give another --out-dir.')

    def _show(self, picture: np.ndarray | None, wait: int) -> None:
        """Show a picture for some milliseconds; 0 is until a key is pressed. Esc and q end the run."""
        if self.show and picture is not None:
            cv2.imshow('mmevm', picture)
            self._is_stopped |= cv2.waitKey(wait) & 0xFF in (27, ord('q'))

    def _progress(self) -> Progress:
        columns = [*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn()]
        return Progress(*columns, console=self._console)

    def _print(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)


def _check_display() -> None:
    variables = ('DISPLAY', 'WAYLAND_DISPLAY')
    if sys.platform == 'linux' and not any(map(os.environ.get, variables)):
        raise ConfigError(
            f'--show: this machine has no display ({" and ".join(variables)} are not set). Leave --show out; '
            'pictures are written to --out-dir.'
        )
    try:
        cv2.namedWindow('mmevm', cv2.WINDOW_NORMAL)
    except cv2.error as error:
        raise ConfigError(
            f'--show: OpenCV {cv2.__version__} cannot open a window. opencv-python-headless has none: install '
            'opencv-python in its place, or leave --show out; pictures are written to --out-dir.'
        ) from error


def _write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a JSON file; a map of classes goes into a PNG file beside it, which the JSON file names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if 'sem_seg' in result:
        png = path.with_suffix('.png')
        if not cv2.imwrite(str(png), result['sem_seg']):
            raise UserError(f'{png} cannot be written. Free space on the disk, or give another --out-dir.')
        result = result | dict(sem_seg=png.name)
    path.write_text(json.dumps(result), encoding='utf-8')


@contextmanager
def _video_writer(path: Path, fps: float) -> Iterator[Any]:
    """Yield a function that appends a picture, (H, W, 3) uint8 in BGR, to an MP4 file."""
    writer: cv2.VideoWriter | None = None

    def write(picture: np.ndarray) -> None:
        nonlocal writer
        if writer is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            height, width = picture.shape[:2]
            writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'mp4v'), fps, (width, height))
            if not writer.isOpened():
                raise UserError(
                    f'{path} cannot be written: OpenCV {cv2.__version__} has no encoder for MP4, or the folder is '
                    'read-only. Add --no-save-vis, or give another --out-dir.'
                )
        writer.write(picture)

    try:
        yield write
    finally:
        if writer is not None:
            writer.release()


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
