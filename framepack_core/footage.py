"""Videos that are gone on with, made by whoever: looked at, and read as frames 30 times a second.

No torch. Only mp4 files are opened, and as nothing else: other containers may name further files to read.
"""

import json
import math
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from framepack_core.buckets import Size
from framepack_core.errors import RequestError
from framepack_core.media import Frames, Picture, crop_to
from framepack_core.request import shown
from framepack_core.sections import FPS, HISTORY_FRAMES

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame

MAX_SECONDS = 3600  # of a video to go on with
MAX_PIXELS = 50_000_000  # of one of its frames: 8K has 33
MAX_HEADER_BYTES = 1 << 16  # of a file of latents, which has a hundred
LATENT_PIXELS = 8  # a latent stands for 8x8 pixels
LATENT_CHANNELS = 16


@dataclass(frozen=True)
class Footage:
    """What a video is, as far as going on with it depends on it."""

    frames: int  # at 30 a second
    height: int  # upright
    width: int

    @property
    def size(self) -> Size:
        """Height and width."""
        return self.height, self.width


def look(path: Path) -> Footage:
    """Read a video's index and its first frame.

    Raises:
        RequestError: it is none that can be gone on with; says why and what to do.
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


REMEDY = "save it again as mp4 (H.264) and drop it again"


@contextmanager
def opened(path: Path) -> "Iterator[InputContainer]":
    """Open a video as mp4, and say in plain words why it cannot be read.

    Raises:
        RequestError: it is none, or is damaged.
    """
    import av

    # From an open file and with its format said: whatever is in it, no other file is opened for it.
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


def pictures(path: Path) -> Iterator[Picture]:
    """Decode a video, upright, frame by frame; at each 30th of a second the frame that is shown then.

    Raises:
        RequestError: it cannot be decoded.
    """
    with opened(path) as container:
        yield from _at_30_fps(container.decode(video=0))


def _at_30_fps(frames: "Iterable[VideoFrame]") -> Iterator[Picture]:
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
            current = _upright(frame)
    if current is not None:
        yield current


def _ticks(seconds: Fraction) -> int:
    """Give the 30th of a second from which a frame is shown: the next one, but for rounded times."""
    return math.ceil(seconds * FPS - Fraction(1, 20))


def _upright(frame: "VideoFrame") -> Picture:
    rgb = frame.to_ndarray(format="rgb24")
    turned: Picture = np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90)))
    return turned


def last_frames(path: Path, size: Size) -> Frames:
    """Give the end of a video, (4T-3, H, W, 3), scaled and cropped: as many frames as ``tail_latents`` says.

    Raises:
        RequestError: it cannot be decoded.
    """
    end = deque(pictures(path), maxlen=frames_of(HISTORY_FRAMES))
    if not end:
        raise RequestError(f"{path.name} has no frame that can be decoded: {REMEDY}")
    count = frames_of(tail_latents(len(end)))
    return np.stack([crop_to(picture, size) for picture in list(end)[-count:]])


def latents_shape(path: Path) -> tuple[int, int, int]:
    """Read, of a file of latents, how many frames, rows and columns there are; its tensors stay unread.

    Raises:
        RequestError: it is not what ``keep_latents`` leaves beside a video.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size) if size <= MAX_HEADER_BYTES else b""
    try:
        told = json.loads(header)["latents"]
        (batch, channels, frames, rows, columns), dtype = told["shape"], told["dtype"]
        numbers = (batch, channels, frames, rows, columns)
        sound = all(type(number) is int and 0 < number < 1 << 16 for number in numbers)
        begin, end = told["data_offsets"]
        whole = path.stat().st_size == 8 + size + 4 * math.prod(numbers) == 8 + size + end - begin
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RequestError(f"{path.name} holds no latents: {NO_LATENTS}") from error
    if not sound or dtype != "F32" or (batch, channels, rows % 2, columns % 2) != (1, LATENT_CHANNELS, 0, 0):
        raise RequestError(
            f"{path.name} holds {shown(dtype)} of shape {shown(told['shape'])}, not the latents of a video, "
            f"F32 of [1, {LATENT_CHANNELS}, frames, height / 8, width / 8]: {NO_LATENTS}"
        )
    if not whole:
        raise RequestError(f"{path.name} is damaged, or not all of it is here: {NO_LATENTS}")
    return frames, rows, columns


NO_LATENTS = "leave it out, and the video is gone on with from its frames"


def frames_of(latents: int) -> int:
    """Count the frames that latents stand for.

    >>> frames_of(37)
    145
    """
    return 4 * latents - 3


def tail_latents(frames: int) -> int:
    """Say how many latents the end of a video becomes: what a section looks back on, or less of a short one.

    >>> tail_latents(300), tail_latents(10)
    (19, 3)
    """
    return min(HISTORY_FRAMES, (frames - 1) // 4 + 1)


def remade(latents: int, window: int) -> int:
    """Count the frames at the end of a video that come with what is added, which fades in over the last.

    Of latents as many as two sections have, decoded once more: those of the last section have been blended
    with nothing yet.
    """
    return frames_of(min(latents, 2 * window))
