"""Pieces of pictures to train with: crops at several scales, mirrored, brighter or darker, and drawn ones."""

import math
import random
from collections.abc import Sequence

import torch
from torch.nn import functional

DRAWN_SHARE = 0.15


class Crops:
    """Gives pieces of pictures, (3, height, width) in [-1, 1]."""

    def __init__(self, pictures: Sequence[torch.Tensor], short_sides: Sequence[int]) -> None:
        """Scale the pictures (3, H, W), uint8, to each of the short sides."""
        self._scaled = [[scaled(picture, side) for side in short_sides] for picture in pictures]

    def one(self, height: int, width: int | None = None) -> torch.Tensor:
        """Draw a piece, by ``random`` and torch's generator: (3, height, width), else square."""
        width = width or height
        if random.random() < DRAWN_SHARE:
            size = max(height, width)
            piece = drawn(size)
        else:
            piece = random.choice(
                [
                    picture
                    for picture in random.choice(self._scaled)
                    if picture.shape[1] >= height
                    and picture.shape[2] >= width
                    and min(picture.shape[1:]) <= 3 * min(height, width)
                ]
            )
        top, left = random.randint(0, piece.shape[1] - height), random.randint(0, piece.shape[2] - width)
        piece = piece[:, top : top + height, left : left + width]
        if random.random() < 0.5:
            piece = piece.flip(2)
        if random.random() < 0.4:
            piece = ((piece + 1) / 2).clamp(0, 1) ** random.uniform(0.6, 1.6) * 2 - 1
            if random.random() < 0.5:
                piece = piece[torch.randperm(3)]
        return piece.clamp(-1, 1)

    def many(self, count: int, size: int) -> torch.Tensor:
        """Draw several square ones, stacked."""
        return torch.stack([self.one(size) for _ in range(count)])


def scaled(picture: torch.Tensor, short_side: int) -> torch.Tensor:
    """Scale a picture (3, H, W), uint8, to [-1, 1] and so many pixels along its shorter side."""
    height, width = picture.shape[1:]
    scale = (short_side + 0.5) / min(height, width)
    size = (int(scale * height), int(scale * width))
    levels = picture[None].float() / 127.5 - 1
    return functional.interpolate(levels, size=size, mode="area")[0]


def centre(picture: torch.Tensor, size: int) -> torch.Tensor:
    """Give the middle of a picture, as large as possible, scaled to ``size``: (3, size, size) in [-1, 1]."""
    piece = scaled(picture, size)
    top, left = ((length - size) // 2 for length in piece.shape[1:])
    return piece[:, top : top + size, left : left + size]


def drawn(size: int) -> torch.Tensor:
    """Draw discs, boxes, bars and scratched discs on a gradient."""
    line = torch.linspace(0, 1, size)
    y, x = torch.meshgrid(line, line, indexing="ij")
    corners = torch.rand(4, 3, 1, 1)
    picture = (corners[0] * (1 - x) + corners[1] * x) * (1 - y) + (corners[2] * (1 - x) + corners[3] * x) * y
    for _ in range(random.randint(2, 8)):
        left, top, radius = random.random(), random.random(), random.uniform(0.04, 0.25)
        angle = random.uniform(0, math.pi)
        along = (x - left) * math.cos(angle) + (y - top) * math.sin(angle)
        across = (y - top) * math.cos(angle) - (x - left) * math.sin(angle)
        disc = (along**2 + across**2).sqrt() - radius
        shapes = (
            disc,
            torch.maximum(along.abs() - radius, across.abs() - radius * random.uniform(0.3, 1.6)),
            along.abs() - radius * 0.3,
            torch.maximum(disc, 0.01 * torch.sin(random.uniform(20, 80) * across)),
        )
        inside = (0.5 - random.choice(shapes) * size).clamp(0, 1)
        picture = picture * (1 - inside) + torch.rand(3, 1, 1) * inside
    return picture * 2 - 1
