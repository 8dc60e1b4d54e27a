"""Draw the picture of the demo: hills, an evening sky and a lake that mirrors them.

    python training/draw_lake.py framepackd/demo/lake.png

Drawn, so that nobody else has rights in it.
"""

import sys

import numpy as np
from PIL import Image

SIZE = 256
HORIZON = 0.55
SUN = (0.68, 0.36)


def main(path: str) -> None:
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    mirrored = np.where(y > HORIZON, 2 * HORIZON - y, y)  # the lake shows what is above it
    picture = sky(x, mirrored)
    for base, height, waves, colour in (
        (0.44, 0.09, ((2.0, 0.3), (5.0, 1.1)), (96, 78, 120)),
        (0.50, 0.06, ((3.0, 2.0), (9.0, 0.4)), (52, 58, 92)),
        (0.54, 0.03, ((6.0, 0.0), (23.0, 1.0)), (24, 38, 52)),
    ):
        ridge = (
            base - height * sum(np.sin(f * 2 * np.pi * x + p) / (i + 1) for i, (f, p) in enumerate(waves)) / 2
        )
        inside = np.clip((mirrored - ridge) * SIZE, 0, 1)[..., None]
        picture = picture * (1 - inside) + np.array(colour) * inside
    water = (y > HORIZON)[..., None]
    ripples = 1 + 0.10 * np.sin(160 * np.clip(y - HORIZON, 0, 1) ** 0.6 + 6 * np.sin(9 * x))[..., None]
    picture = np.where(water, picture * np.array((0.72, 0.80, 0.95)) * ripples, picture)
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(path, optimize=True)


def sky(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    amount = np.clip(y / HORIZON, 0, 1)[..., None]
    colour = np.array((58, 74, 140)) * (1 - amount) + np.array((250, 170, 110)) * amount
    distance = np.hypot(x - SUN[0], y - SUN[1])[..., None]
    glow = np.exp(-((distance / 0.16) ** 2)) * 90
    disc = np.clip((0.055 - distance) * SIZE, 0, 1)
    return (colour + glow) * (1 - disc) + np.array((255, 244, 214)) * disc


if __name__ == "__main__":
    main(sys.argv[1])
