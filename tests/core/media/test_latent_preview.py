"""Previews of latents: colours are right where the map can know them, and bounded everywhere else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framepack_core.media.latent_preview import BACKGROUND, CELL_PIXELS, GAP, Colours, contact_sheet
from framepack_core.media.pictures import Picture

CHANNELS = 16
SEEDS = st.integers(0, 1000)


def photo(rng: np.random.Generator, height: int = 10, width: int = 8) -> Picture:
    """Give a picture (8h, 8w, 3) of one colour per cell of the latents."""
    cells = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cells.repeat(8, axis=0).repeat(8, axis=1)


def encoded(pictures: Picture, rng: np.random.Generator, noise: float = 0.0) -> np.ndarray:
    """Encode pictures (T, 8h, 8w, 3) as a VAE would that is linear, and noisy."""
    cells = pictures[:, ::8, ::8].astype(np.float32) / 127.5 - 1
    latents = cells @ np.random.default_rng(7).normal(size=(3, CHANNELS)) + 2.5
    latents = latents + noise * rng.normal(size=latents.shape)
    return np.moveaxis(latents, -1, 0)[np.newaxis].astype(np.float32)  # (1, C, T, h, w)


@pytest.mark.parametrize(("noise", "off"), [(0.0, 4), (0.1, 16)])
def test_colours_fitted_to_one_picture_show_others(noise: float, off: int) -> None:
    rng = np.random.default_rng(0)
    start = photo(rng)
    colours = Colours.fit(encoded(start[np.newaxis], rng, noise), start)
    others = np.stack([photo(rng), photo(rng)])
    difference = colours.frames(encoded(others, rng, noise)) - others[:, ::8, ::8].astype(float)
    assert np.abs(difference).mean() < off


@given(SEEDS, st.integers(0, 255), st.floats(0, 1e6))
@settings(deadline=None, max_examples=30)
def test_a_picture_of_one_colour_gives_that_colour_whatever_the_latents(
    seed: int, level: int, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    picture = np.full((32, 48, 3), level, np.uint8)
    colours = Colours.fit(rng.normal(size=(1, CHANNELS, 1, 4, 6)).astype(np.float32), picture)
    frames = colours.frames(spread * rng.normal(size=(1, CHANNELS, 2, 4, 6)))
    assert np.abs(frames.astype(int) - level).max() <= 1


def test_a_map_fitted_to_few_latents_stays_bounded() -> None:
    """16 latents for 17 unknowns: without a ridge the map fits perfectly and turns all others into noise."""
    rng = np.random.default_rng(0)
    start = photo(rng, 4, 4)
    colours = Colours.fit(encoded(start[np.newaxis], rng, noise=0.3), start)
    others = np.stack([photo(rng) for _ in range(8)])
    difference = colours.frames(encoded(others, rng, noise=0.3)) - others[:, ::8, ::8].astype(float)
    assert np.abs(difference).mean() < 0.5 * np.abs(others.mean() - others.astype(float)).mean()


@given(SEEDS, st.sampled_from([0.0, np.nan, np.inf, -np.inf, 1e30]))
@settings(deadline=None, max_examples=20)
def test_latents_with_nan_still_give_a_picture(seed: int, value: float) -> None:
    rng = np.random.default_rng(seed)
    start = photo(rng, 4, 6)
    latents = encoded(start[np.newaxis], rng)
    colours = Colours.fit(latents, start)
    latents[:, seed % CHANNELS] = value
    assert colours.frames(latents).shape == (1, 4, 6, 3)
    assert Colours.fit(np.zeros_like(latents), start).frames(latents).shape == (1, 4, 6, 3)


@given(st.integers(1, 33), st.integers(4, 40), st.integers(4, 40))
@settings(deadline=None, max_examples=20)
def test_a_sheet_shows_every_frame_once_in_the_order_of_time(count: int, height: int, width: int) -> None:
    levels = np.linspace(60, 250, count).round().astype(np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (count, height, width, 3))
    sheet = contact_sheet(np.ascontiguousarray(frames))
    scale = CELL_PIXELS / max(height, width)
    cells = [
        sheet[top, left, 0]
        for top in range(0, sheet.shape[0], round(scale * height) + GAP)
        for left in range(0, sheet.shape[1], round(scale * width) + GAP)
    ]
    assert cells[:count] == list(levels)
    assert set(cells[count:]) <= {BACKGROUND}
