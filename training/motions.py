"""What the model is taught: each motion as an exact function of a picture and of time.

Outside of the picture lies its mirror image, so that picture and text decide every frame.
"""

import math
from collections.abc import Callable

import torch
from torch.nn import functional

Positions = tuple[torch.Tensor, torch.Tensor]  # x, y: (T, H, W), from the middle, in halves of the width
Warp = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], Positions]  # x, y, times, size of a pixel
MIDDLE = 33  # frames; by then what changes the light is complete
PAN = 0.75  # pixels a frame, whatever the size: what is learnt on small pictures holds for larger ones
ZOOM = 0.006
TURN = math.radians(0.5)


def _pan(horizontal: float, vertical: float) -> Warp:
    return lambda x, y, t, pixel: (x + horizontal * PAN * pixel * t, y + vertical * PAN * pixel * t)


def _zoom(direction: float) -> Warp:
    def moved(x: torch.Tensor, y: torch.Tensor, t: torch.Tensor, _: float) -> Positions:
        size = torch.exp(-direction * ZOOM * t)
        return x * size, y * size

    return moved


def _turn(direction: float) -> Warp:
    def moved(x: torch.Tensor, y: torch.Tensor, t: torch.Tensor, _: float) -> Positions:
        angle = direction * TURN * t
        return x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()

    return moved


def _ripple(x: torch.Tensor, y: torch.Tensor, t: torch.Tensor, pixel: float) -> Positions:
    size = 8 * pixel * (t / 12).clamp(0, 1)
    # From the top, where the transformer's positions are counted from: the same waves whatever the shape.
    lengths = (y - y.min()) / (128 * pixel)
    return x + size * torch.sin(2 * math.pi * (lengths + t / 36)), y + 0 * t


def _sway(x: torch.Tensor, y: torch.Tensor, t: torch.Tensor, pixel: float) -> Positions:
    return x + 6 * pixel * torch.sin(2 * math.pi * t / 72), y + 0 * t


WARPS: dict[str, Warp] = {
    "pan left": _pan(-1, 0),
    "pan right": _pan(1, 0),
    "tilt up": _pan(0, -1),
    "tilt down": _pan(0, 1),
    "zoom in": _zoom(1),
    "zoom out": _zoom(-1),
    "rotate left": _turn(1),
    "rotate right": _turn(-1),
    "ripple": _ripple,
    "sway": _sway,
}


def _night(picture: torch.Tensor) -> torch.Tensor:
    return picture * torch.tensor([0.18, 0.22, 0.45]).view(3, 1, 1)


def _sunset(picture: torch.Tensor) -> torch.Tensor:
    grey = picture.mean(-3, keepdim=True)
    warm = torch.tensor([1.0, 0.55, 0.25]).view(3, 1, 1)
    return (0.35 * picture + 0.65 * grey) * warm + torch.tensor([0.08, 0.0, 0.0]).view(3, 1, 1)


def _grey(picture: torch.Tensor) -> torch.Tensor:
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    return (picture * weights).sum(-3, keepdim=True).expand_as(picture)


def _fog(picture: torch.Tensor) -> torch.Tensor:
    return 0.25 * picture + 0.75 * torch.tensor([0.82, 0.84, 0.86]).view(3, 1, 1)


LIGHTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "night falls": _night,
    "sunset": _sunset,
    "black and white": _grey,
    "fog": _fog,
}
OTHERWISE = "sway"  # what any other text does
MOTIONS = tuple(name for name in (*WARPS, *LIGHTS) if name != OTHERWISE)


def render(picture: torch.Tensor, motion: str, times: torch.Tensor, *, speed: float = 1.0) -> torch.Tensor:
    """Give the frames of a motion.

    Args:
        picture: (3, H, W) in [-1, 1]: the frame at time 0.
        motion: one of ``MOTIONS``, or ``OTHERWISE``.
        times: in frames, (T,).
        speed: 1 is what the model is taught.

    Returns:
        (T, 3, H, W) in [-1, 1].
    """
    height, width = picture.shape[1:]
    times = times.float() * speed
    if motion in LIGHTS:
        levels = (picture + 1) / 2
        share = (times / MIDDLE).clamp(0, 1).view(-1, 1, 1, 1)
        return ((1 - share) * levels + share * LIGHTS[motion](levels)) * 2 - 1
    x = ((torch.arange(width) + 0.5) / width * 2 - 1).view(1, 1, -1)
    y = ((torch.arange(height) + 0.5) / height * 2 - 1).view(1, -1, 1)
    ratio = height / width
    moved_x, moved_y = WARPS[motion](x, y * ratio, times.view(-1, 1, 1), 2 / width)
    shape = len(times), height, width
    grid = torch.stack([moved_x.expand(shape), (moved_y / ratio).expand(shape)], dim=-1)
    frames = picture[None].expand(len(times), -1, -1, -1)
    return functional.grid_sample(
        frames, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
