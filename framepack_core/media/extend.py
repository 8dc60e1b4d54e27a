"""Counts frames, latents and sections of a video that is extended, and checks its saved latents.

Generation continues from the saved latents of the video, or from its last frames, encoded. The frames at its
end are made again with what is added, which fades in over the last of them. No torch here, no numpy.
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
NO_LATENTS = "leave it out, and the video is extended from its frames"
MAX_HEADER_BYTES = 1 << 16  # of a file of latents, whose header has about a hundred
LATENT_PIXELS = 8  # a latent stands for 8x8 pixels
LATENT_CHANNELS = 16


@dataclass(frozen=True)
class Footage:
    """The length and size of a video that is extended."""

    frames: int  # at 30 a second
    height: int  # upright
    width: int

    @property
    def size(self) -> Size:
        """Height and width."""
        return self.height, self.width


def latents_shape(path: Path) -> tuple[int, int, int]:
    """Read the latent frames, rows and columns from the header of a file of latents.

    Raises:
        RequestError: it is not a file that ``keep_latents`` saves with a video.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size) if size <= MAX_HEADER_BYTES else b""
    try:
        entry = json.loads(header)["latents"]
        (batch, channels, frames, rows, columns), dtype = entry["shape"], entry["dtype"]
        numbers = (batch, channels, frames, rows, columns)
        sound = all(type(number) is int and 0 < number < 1 << 16 for number in numbers)
        begin, end = entry["data_offsets"]
        whole = path.stat().st_size == 8 + size + 4 * math.prod(numbers) == 8 + size + end - begin
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RequestError(f"{path.name} holds no latents: {NO_LATENTS}") from error
    if not sound or dtype != "F32" or (batch, channels, rows % 2, columns % 2) != (1, LATENT_CHANNELS, 0, 0):
        raise RequestError(
            f"{path.name} holds {shown(dtype)} of shape {shown(entry['shape'])}, not the latents of a video, "
            f"F32 of [1, {LATENT_CHANNELS}, frames, height / 8, width / 8]: {NO_LATENTS}"
        )
    if not whole:
        raise RequestError(f"{path.name} is damaged, or not all of it is here: {NO_LATENTS}")
    return frames, rows, columns


def frames_of(latents: int) -> int:
    """Count the frames that decode from ``latents`` latent frames.

    >>> frames_of(37)
    145
    """
    return 4 * latents - 3


def tail_latents(frames: int) -> int:
    """Count the latents that the end of a video is encoded to: a section's history, or fewer if it is short.

    >>> tail_latents(300), tail_latents(10)
    (19, 3)
    """
    return min(HISTORY_FRAMES, (frames - 1) // 4 + 1)


def sections_taken(latents: int, window: int) -> int:
    """Count the sections that made ``latents`` latent frames, the first of which was given.

    >>> sections_taken(37, 9)
    4
    """
    return math.ceil((latents - 1) / window)


def remade(latents: int, window: int) -> int:
    """Count the frames at the end of a video that are made again, to fade in what is added.

    These are the frames of two sections' latents: the last section has not been blended with a next one yet.
    """
    return frames_of(min(latents, 2 * window))
