"""Makes a filmstrip of a finished video's frames for the results page."""

import math
from pathlib import Path

from av import VideoFrame
from PIL import Image

from framepack_core.media.video_colours import to_rgb

FRAMES = 5
FRAME_PIXELS = 240 * 240  # of each, whatever its shape
QUALITY = 80  # of the JPEG: 30 kB for five frames of a photo


class Strip:
    """Collects frames, from the first to the last, while a video is decoded for another reason."""

    def __init__(self, count: int) -> None:
        """Expect a video of so many frames."""
        self._wanted = {round(number * (count - 1) / (FRAMES - 1)) for number in range(FRAMES)}
        self._frames: list[Image.Image] = []

    def look(self, number: int, frame: VideoFrame) -> None:
        """Keep a frame, small, if it is one of those that are shown."""
        if number in self._wanted:
            scale = math.sqrt(FRAME_PIXELS / (frame.width * frame.height))
            size = max(round(scale * frame.height), 1), max(round(scale * frame.width), 1)
            self._frames.append(Image.fromarray(to_rgb(frame, "bt601", size)))

    def save(self, path: Path) -> None:
        """Write the strip as a JPEG.

        Raises:
            OSError: it cannot be written.
        """
        width, height = self._frames[0].size
        strip = Image.new("RGB", (width * len(self._frames), height))
        for number, frame in enumerate(self._frames):
            strip.paste(frame, (number * width, 0))
        strip.save(path, "JPEG", quality=QUALITY)
