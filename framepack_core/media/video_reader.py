"""Reads untrusted videos that jobs extend, and gives their frames at 30 a second.

No torch here. Files are opened as mp4 only: other containers can name further files to read.
"""

import math
import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av import VideoFrame
from av.container import InputContainer

from framepack_core.errors import RequestError
from framepack_core.media.extend import REMEDY, Footage, frames_of, tail_latents
from framepack_core.media.pictures import Frames, Picture, crop_to
from framepack_core.media.sizes import Size
from framepack_core.media.video_colours import Colours, refuse_hdr, to_rgb
from framepack_core.sections import FPS, HISTORY_FRAMES

MAX_SECONDS = 600  # of a video to extend
MAX_PIXELS = 50_000_000  # of a frame: 8K has 33 million
MAX_COMMENT = 1 << 18  # characters; settings take about 1,000 and their prompts
# libx264 writes its options into a video's first packet: those that `segments` has always set.
_OUR_OPTIONS = re.compile(rb"x264 - core [^\0]* (bframes=3 [^\0]* rc=crf mbtree=0 |rc=cqp mbtree=0 qp=0)")


def look(path: Path) -> Footage:
    """Read a video's index and its first frame.

    Raises:
        RequestError: it cannot be extended; the text says why and what to do.
    """
    with opened(path) as container:
        stream = container.streams.video[0]
        packets = (packet for packet in container.demux(stream) if packet.size and not packet.is_discard)
        times = [packet.pts for packet in packets if packet.pts is not None]
        if not times or stream.time_base is None:
            raise RequestError(f"{path.name} has no frames: {REMEDY}")
        seconds = (max(times) - min(times)) * stream.time_base
        if seconds > MAX_SECONDS:
            raise RequestError(
                f"{path.name} is {float(seconds):.0f} s long: at most {MAX_SECONDS} s can be: cut it"
            )
    first = next(pictures(path), None)
    if first is None:
        raise RequestError(f"{path.name} has no frame that can be decoded: {REMEDY}")
    return Footage(_ticks(seconds) + 1, *first.shape[:2])


@contextmanager
def opened(path: Path) -> Iterator[InputContainer]:
    """Open a video as mp4; turn the errors of the library into RequestErrors.

    Raises:
        RequestError: it is no mp4 video, or is damaged.
    """
    # An open file and a fixed format: whatever it contains, no other file is opened.
    with (
        path.open("rb") as file,
        _explained(path),
        av.open(file, format="mp4", mode="r", metadata_errors="ignore") as container,
    ):
        if not container.streams.video:
            raise RequestError(f"{path.name} holds no video: {REMEDY}")
        context = container.streams.video[0].codec_context
        if context.width * context.height > MAX_PIXELS:
            raise RequestError(
                f"{path.name} has frames of {context.width}x{context.height}: at most "
                f"{MAX_PIXELS // 10**6} megapixels: scale it down and drop it again"
            )
        try:
            refuse_hdr(context)
        except RequestError as error:
            raise RequestError(f"{path.name} {error}") from error
        yield container


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except RequestError:
        raise
    except MemoryError as error:
        raise RequestError(f"{path.name} needs too much memory to decode: {REMEDY}") from error
    except Exception as error:  # a damaged file can make the library raise anything
        raise RequestError(f"{path.name} cannot be read as mp4 ({error}): {REMEDY}") from error


def has_our_options(path: Path) -> bool:
    """Return whether a video was encoded with the options of this and all earlier versions.

    Raises:
        RequestError: it cannot be read.
    """
    with opened(path) as container:
        first = next(container.demux(container.streams.video[0]))
        return _OUR_OPTIONS.search(bytes(first)) is not None


def comment(path: Path) -> str | None:
    """Read the comment in a video's metadata; None if there is none, or it is too long to be ours.

    Raises:
        RequestError: it cannot be read.
    """
    with opened(path) as container:
        said: str = container.metadata.get("comment", "")
    return said if 0 < len(said) <= MAX_COMMENT else None


def pictures(path: Path, untagged: Colours | None = None) -> Iterator[Picture]:
    """Decode a video, upright, at 30 frames a second: for each 30th of a second the frame shown then.

    Its colours are those of its tags, else ``untagged``, else what players guess.

    Raises:
        RequestError: it cannot be decoded.
    """
    with opened(path) as container:
        yield from _at_30_fps(container.decode(video=0), untagged)


def _at_30_fps(frames: Iterable[VideoFrame], untagged: Colours | None) -> Iterator[Picture]:
    first: Fraction | None = None
    current: Picture | None = None
    given = 0
    for frame in frames:
        if frame.pts is None or frame.time_base is None:
            continue
        time = frame.pts * Fraction(frame.time_base)
        first = time if first is None else first
        tick = _ticks(time - first)
        while current is not None and given < tick:
            yield current
            given += 1
        if given <= tick:
            rgb = to_rgb(frame, untagged)
            current = np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90)))
    if current is not None:
        yield current


def _ticks(seconds: Fraction) -> int:
    """Give the first 30th of a second at which a frame is shown; tolerates rounded times."""
    return math.ceil(seconds * FPS - Fraction(1, 20))


def last_frames(path: Path, size: Size) -> Frames:
    """Give the last frames of a video, (4T-3, H, W, 3), scaled and cropped; T is from ``tail_latents``.

    Raises:
        RequestError: it cannot be decoded.
    """
    end = deque(pictures(path), maxlen=frames_of(HISTORY_FRAMES))
    if not end:
        raise RequestError(f"{path.name} has no frame that can be decoded: {REMEDY}")
    count = frames_of(tail_latents(len(end)))
    return np.stack([crop_to(picture, size) for picture in list(end)[-count:]])
