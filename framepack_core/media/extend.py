"""Extends videos: how many frames of one count, its size, and the latents that may lie beside it.

A video goes on from the latents that were kept of it, or from those that its last frames become. The frames
at its end are made anew with what is added, which fades in over the last of them. No torch here, no numpy.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from framepack_core.errors import RequestError
from framepack_core.media.sizes import Size
from framepack_core.mistakes import shown
from framepack_core.sections import HISTORY_FRAMES

REMEDY = "save it again as mp4 (H.264) and drop it again"
NO_LATENTS = "leave it out, and the video is gone on with from its frames"
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


def sections_taken(latents: int, window: int) -> int:
    """Count the sections that made so many latents, the picture or frame that they began with left out.

    >>> sections_taken(37, 9)
    4
    """
    return math.ceil((latents - 1) / window)


def remade(latents: int, window: int) -> int:
    """Count the frames at the end of a video that come with what is added, which fades in over the last.

    Of latents as many as two sections have, decoded once more: those of the last section have been blended
    with nothing yet.
    """
    return frames_of(min(latents, 2 * window))
