"""Recognizes broken videos: NaN, black or one colour, frozen, nothing but noise.

Cheap measures of each frame, section by section, in any order and portion. They mark a video and do not
refuse it, so the limits lie where no clip of the kind people make is marked: photos panned over, with and
without grain, real videos, night, fog, grass, gravel, snow, confetti, stars.
The comment at each limit names the nearest harmless clip and the nearest broken one (640x640, median frame).
"""

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from framepack_core.media.pictures import Frames, Picture

Plane = np.ndarray[Any, np.dtype[np.float32]]  # levels of one channel, or means of tiles

TILE = 16  # pixels; two cells of the latents, so that in noise neighbouring tiles are unrelated
ROW_STEP = 4  # of each tile every 4th row is measured: 64 of its 256 pixels
MIN_TILES = 64  # a frame of fewer (128x128) is too small to tell noise from a picture

# One colour. Both must hold: a faint fog has small ranges, a few stars move no tile's mean.
BLANK_RANGE = 16  # of the pixels, per channel: fog 13, night 83; one colour with noise of sigma 1: 9
BLANK_TILE_RANGE = 2.0  # of the means of tiles: faint fog 5.0; one colour with noise of sigma 1: 0.8
BLACK_MEAN = 16.0  # a blank frame that is darker is called black
BLANK_SHARE = 0.5  # of the frames: a video may fade to black

# Frozen: no tile's mean brightness ever leaves this range. Drifting faint fog 3.9, breathing by half a pixel
# 5.4, a night with one light moving 6.3, a blink 8.3; one picture with noise of sigma 1 in each frame 1.0.
FROZEN_RANGE = 1.5
FROZEN_FRAMES = 2  # of fewer, none has a neighbour

# Noise. Everywhere alike: activity of the calmest tenth of the tiles over that of the median tile.
EVEN_ACTIVITY = 0.6  # confetti 0.0 to 0.54, most photos under 0.4, grass 0.66, any with grain 0.8; noise 0.62
# Noise of pixels: neighbours are unrelated, and there is more of it than the heaviest film grain.
WHITE_CORRELATION = 0.3  # fine grass 0.61, stars 0.50; noise 0.00
WHITE_CONTRAST = 24.0  # fog with grain of sigma 12: 12; noise of sigma 30: 30
# Noise of latents, decoded: tiles are unrelated, the colours are too, and differences have no heavy tail,
# which edges give to all pictures of things.
BLOCKY_CONTRAST = 12.0  # latents of half the usual deviation: 20
BLOCKY_CORRELATION = 0.12  # fine gravel 0.09, grass 0.12 to 0.22, photos 0.3 and more; latents 0.06
BLOCKY_COLOUR = 0.2  # gravel, grass, snow 0, most photos 0.1; latents 0.28
BLOCKY_TAIL = 0.65  # confetti 0.2 to 0.4, photos 0.3 to 0.7; latents 0.76, the demo model 0.70
NOISE_SHARE = 0.25  # of the frames: one section in four


@dataclass(eq=False)
class Measures:
    """What the frames so far have shown; their order and portions make no difference."""

    frames: int = 0
    not_finite: int = 0  # frames made from pixels that were NaN or infinite
    blank: int = 0  # frames of one colour
    blank_mean: float = 0.0  # of the brightest of them
    noisy: int = 0  # frames that are nothing but noise
    noise_pixels: float = -1.0  # highest correlation of neighbouring pixels in them
    noise_tiles: float = -1.0  # and of neighbouring tiles
    moves: bool = False
    darkest: Plane | None = None  # of each tile, while nothing moves
    brightest: Plane | None = None

    def add(self, frames: Frames, *, finite: bool = True) -> None:
        """Measure frames (T, H, W, 3), each once; ``finite`` is false if their pixels held NaN or infinity.

        2.5 ms a frame of 640x640.
        """
        for frame in frames:
            seen = measure(frame)
            self.frames += 1
            self.not_finite += not finite
            if seen.blank:
                self.blank += 1
                self.blank_mean = max(self.blank_mean, seen.mean)
            if seen.noisy:
                self.noisy += 1
                self.noise_pixels = max(self.noise_pixels, seen.pixel_correlation)
                self.noise_tiles = max(self.noise_tiles, seen.tile_correlation)
            if not self.moves:
                self._follow(seen.tiles, seen.tiles)

    def __iadd__(self, other: Self) -> Self:
        """Add what other frames of the same video have shown."""
        self.frames += other.frames
        self.not_finite += other.not_finite
        self.blank += other.blank
        self.blank_mean = max(self.blank_mean, other.blank_mean)
        self.noisy += other.noisy
        self.noise_pixels = max(self.noise_pixels, other.noise_pixels)
        self.noise_tiles = max(self.noise_tiles, other.noise_tiles)
        if self.moves or other.moves:
            self.moves, self.darkest, self.brightest = True, None, None
        elif other.darkest is not None and other.brightest is not None:
            self._follow(other.darkest, other.brightest)
        return self

    def _follow(self, darkest: Plane, brightest: Plane) -> None:
        self.darkest = darkest if self.darkest is None else np.minimum(self.darkest, darkest)
        self.brightest = brightest if self.brightest is None else np.maximum(self.brightest, brightest)
        if self._movement() > FROZEN_RANGE:
            self.moves, self.darkest, self.brightest = True, None, None

    def _movement(self) -> float:
        if self.darkest is None or self.brightest is None:
            return 0.0
        return float((self.brightest - self.darkest).max())

    def verdict(self, picture: Picture | None = None) -> str | None:
        """Say in words, with figures, what is wrong with the video; None if nothing is.

        ``picture`` is what it was made from, cropped to its size: if that is of one colour or noise, so may
        the video be.
        """
        given = None if picture is None else measure(picture)
        if self.not_finite:
            return f"not finite: {self.not_finite} of {self.frames} frames have pixels that are not numbers"
        if self.blank > BLANK_SHARE * self.frames and not (given and given.blank):
            kind = "black" if self.blank_mean < BLACK_MEAN else "blank"
            what = "are of one colour, of mean brightness"
            return f"{kind}: {self.blank} of {self.frames} frames {what} {self.blank_mean:.1f} of 255 at most"
        if self.frames and self.noisy >= NOISE_SHARE * self.frames and not (given and given.noisy):
            return (
                f"noise: {self.noisy} of {self.frames} frames are nothing else: neighbouring pixels "
                f"correlate by at most {self.noise_pixels:.2f}, neighbouring blocks by {self.noise_tiles:.2f}"
            )
        if self.frames >= FROZEN_FRAMES and not self.moves:
            change = f"no part of the picture changes by more than {self._movement():.2f} of 255"
            return f"frozen: {change} in {self.frames} frames"
        return None

    def to_json(self) -> dict[str, Any]:
        """Give the JSON for a checkpoint: a few numbers, and the tiles' means while nothing moves."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Restore what :meth:`to_json` gave."""
        planes = {
            name: np.array(values[name], np.float32)
            for name in ("darkest", "brightest")
            if values[name] is not None
        }
        return cls(**(values | planes))


@dataclass(frozen=True)
class FrameMeasures:
    """The measures of one frame; levels are of 255."""

    pixel_range: float  # of the channel with the widest
    tile_range: float  # the same of the means of tiles
    contrast: float  # standard deviation of the channel with the largest
    pixel_correlation: float  # of horizontal neighbours, green
    tile_correlation: float  # of neighbouring tiles, green
    colour: float  # 0: red and blue follow green everywhere, 1: they are unrelated to it; by tiles
    evenness: float  # activity of the calmest tenth of the tiles over the median tile's, green
    tail: float  # mean over root mean square of horizontal differences: 0.8 for normal ones, less with edges
    tiles: Plane  # means, green
    mean: float

    @property
    def blank(self) -> bool:
        """One colour all over."""
        return self.pixel_range < BLANK_RANGE and self.tile_range < BLANK_TILE_RANGE

    @property
    def noisy(self) -> bool:
        """Nothing but noise, of pixels or of decoded latents."""
        if self.tiles.size < MIN_TILES or self.evenness < EVEN_ACTIVITY:
            return False
        white = self.contrast > WHITE_CONTRAST and self.pixel_correlation < WHITE_CORRELATION
        blocky = (
            self.contrast > BLOCKY_CONTRAST
            and self.tile_correlation < BLOCKY_CORRELATION
            and self.colour > BLOCKY_COLOUR
            and self.tail > BLOCKY_TAIL
        )
        return white or blocky


def measure(frame: Picture) -> FrameMeasures:
    """Measure one frame (H, W, 3), uint8; of each tile every 4th row, edges that fill no tile left out."""
    height, width = (length // TILE * TILE for length in frame.shape[:2])
    sampled = frame[:height:ROW_STEP, :width].transpose(2, 0, 1)
    planes = np.ascontiguousarray(sampled, dtype=np.float32)  # (3, H / 4, W)
    tiles = _tile_means(planes)
    green, green_tiles = planes[1], tiles[1]
    differences = np.abs(np.diff(green, axis=1, append=green[:, -1:]))
    activity = _tile_means(differences[np.newaxis])[0]
    calm, median = np.percentile(activity, (10, 50))
    return FrameMeasures(
        pixel_range=float(np.ptp(planes, axis=(1, 2)).max()),
        tile_range=float(np.ptp(tiles, axis=(1, 2)).max()),
        contrast=float(planes.std(axis=(1, 2)).max()),
        pixel_correlation=_correlation(green[:, 1:], green[:, :-1]),
        tile_correlation=(
            _correlation(green_tiles[:, 1:], green_tiles[:, :-1])
            + _correlation(green_tiles[1:], green_tiles[:-1])
        )
        / 2,
        colour=1 - (_correlation(tiles[0], green_tiles) + _correlation(tiles[2], green_tiles)) / 2,
        evenness=float(calm / median) if median else 0.0,
        tail=float(differences.mean() / np.sqrt(np.square(differences).mean())) if median else 0.0,
        tiles=green_tiles,
        mean=float(planes.mean()),
    )


def _tile_means(planes: Plane) -> Plane:
    """Average over tiles: (C, H / 4, W) to (C, H / 16, W / 16)."""
    channels, rows, width = planes.shape
    per_tile = TILE // ROW_STEP
    columns = planes.reshape(channels, rows // per_tile, per_tile, width).sum(axis=2)
    sums: Plane = columns.reshape(channels, rows // per_tile, width // TILE, TILE).sum(axis=3)
    return sums / np.float32(per_tile * TILE)


def _correlation(one: Plane, other: Plane) -> float:
    """Correlate two planes; 1 where one is flat, which is no sign of noise."""
    one, other = one - one.mean(), other - other.mean()
    norm = float(np.sqrt(np.square(one).mean() * np.square(other).mean()))
    return float((one * other).mean()) / norm if norm else 1.0
