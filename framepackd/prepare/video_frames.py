"""Chooses the frames of a video that a job starts and ends with, and measures their difference.

They are the frames that FramePack's data scripts take with moviepy, so that a threshold found with these
keeps its meaning: the frame that a constant frame rate shows at a time. More than 100 frames ahead moviepy
seeks, and takes the first frame from that time on.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import av
import numpy as np
from skimage.metrics import structural_similarity

from framepack_core.errors import RequestError
from framepack_core.media.pictures import Picture
from framepack_core.media.video_colours import refuse_hdr, to_rgb

SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif"),
    *(".mpg", ".mpeg", ".m2ts", ".wmv", ".flv", ".ogv", ".3gp"),
)
BEFORE_END = 0.1  # seconds before the end, where a frame can still be decoded
JUMP = 100  # frames; further ahead moviepy seeks
TOLERANCE = 1e-4  # seconds that a time stamp may be rounded by
LEAST_SIDE = 7  # pixels: the window in which frames are compared
TRUNCATED = 1.0  # seconds that may be missing at the end of the pictures
# Chosen by content, not by name. None may be a playlist: that would make ffmpeg read other files.
FORMATS = "mov,matroska,avi,gif,mpeg,mpegts,asf,flv,ogg"


class VideoError(RequestError):
    """A file gives no frames; the text follows its name."""


def read_frames(path: Path, count: int) -> Iterator[Picture]:
    """Yield two or more evenly spaced frames, upright: from the first to the one 0.1 s before the end.

    Holds two of them at a time, however long the video is.

    Raises:
        VideoError: it is not a video, is damaged, or too short for so many different frames.
    """
    if path.exists() and not path.is_file():
        raise VideoError("is not a regular file: leave it out")
    try:
        with _Reader(path) as reader:
            duration, rate = reader.duration(), reader.rate()
            position, last = 0, -1.0
            for time in np.linspace(0, max(duration - BEFORE_END, 0), count).tolist():
                before, position = position, int(rate * time + 1e-5)
                if position > before + JUMP:
                    reader.jump(time)
                else:
                    reader.go_on(until=(position + 0.5) / rate)
                if reader.ended and reader.time < min(time, reader.length()) - TRUNCATED:
                    raise VideoError(
                        f"is damaged: its pictures end at {reader.time:.2f} s of {duration:.2f} s"
                    )
                if reader.time <= last:
                    raise VideoError(f"has not {count} different frames: its last is at {last:.2f} s")
                last = reader.time
                yield reader.picture()
    except av.FFmpegError as error:
        raise VideoError(f"cannot be read as a video ({error.strerror}): is it one, and whole?") from error


def difference(one: Picture, other: Picture) -> float:
    """Say how much two frames differ: 1 - SSIM of their grey values; 0 for the same frame.

    The data range is 1 although the values go to 255, as in FramePack's data scripts: what differs in
    structure then counts fully, however faint it is, and 0.9 is their threshold.

    Raises:
        VideoError: they are of different sizes, or too small to compare.
    """
    if one.shape != other.shape or min(one.shape[:2]) < LEAST_SIDE:
        sizes = " and ".join(f"{picture.shape[1]}x{picture.shape[0]}" for picture in (one, other))
        raise VideoError(f"has pictures of {sizes}: they need one size, of {LEAST_SIDE} pixels or more")
    similarity: Any = structural_similarity(np.mean(one, axis=2), np.mean(other, axis=2), data_range=1.0)
    return max(0.0, float(1 - similarity))  # rounding may give a little less than 0


class _Reader:
    """Goes forward through a video, holding the current frame and the next; times are in seconds."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def _open(self, at: float | None = None) -> None:
        """Start with the first frame, or with the key frame before a time."""
        self._container = av.open(
            str(self._path.absolute()),
            metadata_errors="replace",
            container_options={"format_whitelist": FORMATS, "protocol_whitelist": "file"},
        )
        stream = self._container.streams.best("video")
        if not isinstance(stream, av.VideoStream):
            self._container.close()
            raise VideoError("holds no pictures, only sound: leave it out")
        try:
            refuse_hdr(stream.codec_context)
        except RequestError as error:
            self._container.close()
            raise VideoError(str(error)) from error
        self._stream = stream
        stream.thread_type = "AUTO"
        self._start = (self._container.start_time or 0) / av.time_base
        if at is not None and stream.time_base:
            self._container.seek(int((at + self._start) / stream.time_base), stream=stream)
        self._frames = self._container.decode(stream)
        first = next(self._frames, None)
        if first is None:
            self._container.close()
            raise VideoError("has no frame that can be decoded: convert it to mp4")
        self._shown = first
        self._next = next(self._frames, None)

    def _advance(self) -> None:
        if self._next is not None:
            self._shown, self._next = self._next, next(self._frames, None)

    def _time(self, frame: av.VideoFrame) -> float:
        return (frame.time or 0.0) - self._start

    @property
    def time(self) -> float:
        """The time of the current frame."""
        return self._time(self._shown)

    @property
    def ended(self) -> bool:
        """Whether the current frame is the last."""
        return self._next is None

    def go_on(self, until: float) -> None:
        """Advance to the last frame that is not after a time."""
        while self._next is not None and self._time(self._next) <= until:
            self._advance()

    def jump(self, time: float) -> None:
        """Seek the first frame that is not before a time, or the last if there is none."""
        self._container.close()
        try:
            self._open(at=time)
            late = self.time > time + TOLERANCE
        except VideoError:
            late = True
        if late:  # some files cannot be sought in, or only to a later frame
            self._container.close()
            self._open()
        while self._next is not None and self.time < time - TOLERANCE:
            self._advance()

    def picture(self) -> Picture:
        """Give the current frame, upright."""
        return np.ascontiguousarray(np.rot90(to_rgb(self._shown), self._shown.rotation // 90))

    def rate(self) -> float:
        """Give the lowest constant frame rate that shows all frames, in frames a second."""
        rate = self._stream.base_rate or self._stream.guessed_rate or self._stream.average_rate
        if not rate:
            raise VideoError("has no frame rate: convert it to mp4")
        return float(rate)

    def length(self) -> float:
        """Give the length of the video stream as the file states it; 0 if it does not."""
        return float((self._stream.duration or 0) * (self._stream.time_base or 0))

    def duration(self) -> float:
        """Give the length of the file, to 0.01 s as ffmpeg prints it, or of a stream that ends earlier."""
        seconds = (self._container.duration or 0) / av.time_base
        if not seconds:  # an interrupted recording
            with _Reader(self._path) as other:
                seconds = max(
                    (float((packet.pts + (packet.duration or 0)) * packet.time_base) - self._start)
                    for packet in other._container.demux(other._stream)
                    if packet.pts is not None and packet.time_base
                )
        length = self.length()
        return length if 0 < length < seconds - BEFORE_END else int(seconds * 100 + 0.5) / 100
