"""Draws rough previews of latents by a linear map from their channels to colours, without a decoder.

The map is fitted for each video to its start picture and the picture's latents, so that it suits any VAE.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from einops import rearrange, reduce
from PIL import Image

from framepack_core.media.pictures import Picture

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]

# Variance added to each channel's, as a share of their mean: uninformative channels get no weight, and the
# map stays bounded for a picture of 16 latents, or of one colour.
RIDGE = 1e-2
CELL_PIXELS = 200  # longer side of a frame in the contact sheet, roughly
GAP = 4  # pixels between frames
BACKGROUND = 24


@dataclass(frozen=True)
class Colours:
    """A fitted map: a colour, in levels of 255, is ``mean_colour + (channels - mean_channels) @ weights``."""

    weights: Floats  # (C, 3)
    mean_channels: Floats  # (C,)
    mean_colour: Floats  # (3,)

    @classmethod
    def fit(cls, latents: Floats, picture: Picture) -> Self:
        """Fit the map by least squares to a picture (H, W, 3) and its latents (1, C, 1, h, w)."""
        height, width = latents.shape[-2:]
        channels = rearrange(latents[0, :, 0].astype(np.float64), "c h w -> (h w) c")
        scale = {"y": picture.shape[0] // height, "x": picture.shape[1] // width}
        colours = reduce(picture.astype(np.float64), "(h y) (w x) c -> (h w) c", "mean", **scale)
        mean_channels, mean_colour = channels.mean(axis=0), colours.mean(axis=0)
        channels, colours = channels - mean_channels, colours - mean_colour
        moments = channels.T @ channels / len(channels)
        # The second term avoids a division by zero where all latents are equal.
        damping = RIDGE * np.trace(moments) / len(moments) + np.finfo(np.float64).tiny
        common = channels.T @ colours / len(channels)
        weights = np.linalg.solve(moments + damping * np.eye(len(moments)), common)
        return cls(weights, mean_channels, mean_colour)

    def frames(self, latents: Floats) -> Picture:
        """Map latents (1, C, T, h, w) to frames (T, h, w, 3), uint8."""
        numbers = np.nan_to_num(latents[0].astype(np.float64), posinf=0, neginf=0)
        levels = (rearrange(numbers, "c t h w -> t h w c") - self.mean_channels) @ self.weights
        frames: Picture = (levels + self.mean_colour).clip(0, 255).astype(np.uint8)
        return frames


def contact_sheet(frames: Picture) -> Picture:
    """Arrange frames (T, h, w, 3), enlarged, in rows in the order of time."""
    count, height, width = frames.shape[:3]
    scale = max(CELL_PIXELS / max(height, width), 1.0)
    cell_height, cell_width = round(scale * height), round(scale * width)
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    size = (rows * (cell_height + GAP) - GAP, columns * (cell_width + GAP) - GAP, 3)
    sheet = np.full(size, BACKGROUND, np.uint8)
    for number, frame in enumerate(frames):
        top, left = (number // columns) * (cell_height + GAP), (number % columns) * (cell_width + GAP)
        enlarged = Image.fromarray(frame).resize((cell_width, cell_height), Image.Resampling.BICUBIC)
        sheet[top : top + cell_height, left : left + cell_width] = enlarged
    return sheet
