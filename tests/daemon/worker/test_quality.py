"""Broken videos are recognised, and videos of difficult things are not taken for broken."""

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from framepack_core.media.pictures import Frames
from framepackd.worker.quality import Measures

SIZE, LENGTH = 256, 8


def picture() -> Image.Image:
    with Image.open(Path(str(files("framepackd") / "demo/lake.png"))) as image:
        return image.convert("RGB").resize((320, 320))


def pan(speed: float = 2.0) -> Frames:
    """Move over the demo's picture, ``speed`` pixels a frame."""
    moved = [
        picture().transform(
            (SIZE, SIZE),
            Image.Transform.AFFINE,
            (1, 0, speed * time, 0, 1, 0),
            Image.Resampling.BICUBIC,
        )
        for time in range(LENGTH)
    ]
    return np.stack([np.asarray(image) for image in moved])


def still() -> Frames:
    return np.repeat(pan()[:1], LENGTH, axis=0)


def colour(*rgb: int) -> Frames:
    return np.full((LENGTH, SIZE, SIZE, 3), rgb, np.uint8)


def grainy(frames: Frames, sigma: float) -> Frames:
    noise = np.random.default_rng(0).normal(0, sigma, frames.shape)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


def noise_of_latents(contrast: float = 45) -> Frames:
    """Scale unrelated values up by eight, as what comes out of a VAE that is given noise."""
    latents = np.random.default_rng(0).normal(0, contrast, (LENGTH, SIZE // 8, SIZE // 8, 3))
    frames = [
        [
            Image.fromarray(plane.astype(np.float32)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            for plane in latent.transpose(2, 0, 1)
        ]
        for latent in latents
    ]
    scaled = np.array([[np.asarray(plane) for plane in planes] for planes in frames])
    return grainy(128 + scaled.transpose(0, 2, 3, 1), 8)  # with texture, which a decoder adds


def white_noise() -> Frames:
    return np.random.default_rng(0).integers(0, 256, (LENGTH, SIZE, SIZE, 3), dtype=np.uint8)


def night() -> Frames:
    frames = colour(2, 2, 6)
    for time, frame in enumerate(frames):
        frame[100:106, 40 + 6 * time : 46 + 6 * time] = 60
    return frames


def fog() -> Frames:
    y, x = np.mgrid[:SIZE, :SIZE]
    frames = [228 + 5 * np.sin((x + 9 * time) / 60) * np.cos(y / 70) for time in range(LENGTH)]
    return np.repeat(np.stack(frames).astype(np.uint8)[..., np.newaxis], 3, axis=3)


def confetti(pieces: int, size: int) -> Frames:
    generator = np.random.default_rng(1)
    places, colours = generator.uniform(0, SIZE, (pieces, 2)), generator.integers(0, 256, (pieces, 3))
    frames = []
    for time in range(LENGTH):
        image = Image.new("RGB", (SIZE, SIZE), (30, 30, 40))
        draw = ImageDraw.Draw(image)
        for (x, y), rgb in zip(places, colours, strict=True):
            top = (y + 9 * time) % SIZE
            draw.rectangle((x, top, x + size, top + size / 2), fill=tuple(int(value) for value in rgb))
        frames.append(np.asarray(image))
    return np.stack(frames)


def snowstorm() -> Frames:
    generator = np.random.default_rng(2)
    flakes = generator.uniform(0, SIZE, (1000, 2))
    frames = []
    for time in range(LENGTH):
        image = Image.new("RGB", (SIZE, SIZE), (90, 90, 95))
        draw = ImageDraw.Draw(image)
        for x, y in flakes:
            top = (y + 8 * time) % SIZE
            draw.ellipse((x, top, x + 4, top + 4), fill=(230, 230, 235))
        frames.append(np.asarray(image))
    return np.stack(frames)


def blinking() -> Frames:
    """A still picture in which for two frames something of 12 x 5 pixels changes a little."""
    frames = still()
    frames[3:5, 140:145, 90:102] = frames[3:5, 140:145, 90:102] // 2
    return frames


def fading() -> Frames:
    return (pan() * np.linspace(1, 0, LENGTH)[:, np.newaxis, np.newaxis, np.newaxis]).astype(np.uint8)


def cut() -> Frames:
    return np.concatenate([pan()[:4], fog()[4:]])


def flat_drawing() -> Frames:
    frames = colour(240, 220, 120)
    for time, frame in enumerate(frames):
        frame[160:, :] = (80, 170, 90)
        frame[120:160, 20 + 20 * (time // 3) : 60 + 20 * (time // 3)] = (220, 60, 60)
    return frames


def verdict(frames: Frames) -> str | None:
    measures = Measures()
    measures.add(frames)
    return measures.verdict()


HARMLESS: dict[str, Callable[[], Frames]] = {
    "a slow pan": lambda: pan(0.5),
    "a pan with light grain": lambda: grainy(pan(), 4),
    "a pan with heavy grain": lambda: grainy(pan(), 12),
    "a night": night,
    "a night with heavy grain": lambda: grainy(night(), 12),
    "fog": fog,
    "fog with heavy grain": lambda: grainy(fog(), 12),
    "a blink": blinking,
    "confetti": lambda: confetti(200, 12),
    "dense fine confetti": lambda: confetti(3000, 8),
    "a snowstorm": snowstorm,
    "a fade to black": fading,
    "a hard cut": cut,
    "a flat drawing": flat_drawing,
    "one frame": lambda: pan()[:1],
}


@pytest.mark.parametrize("clip", HARMLESS.values(), ids=HARMLESS.keys())
def test_nothing_is_said_of(clip: Callable[[], Frames]) -> None:
    assert verdict(clip()) is None


BROKEN: dict[str, tuple[Callable[[], Frames], str]] = {
    "black": (
        lambda: colour(0, 0, 0),
        "black: 8 of 8 frames are of one colour, of mean brightness 0.0 of 255",
    ),
    "nearly black": (lambda: grainy(colour(1, 1, 1), 1), "black: 8 of 8"),
    "grey": (
        lambda: colour(127, 127, 127),
        "blank: 8 of 8 frames are of one colour, of mean brightness 127.0",
    ),
    "a colour": (lambda: grainy(colour(200, 30, 90), 1), "blank: 8 of 8"),
    "frozen": (still, "frozen: no part of the picture changes by more than 0.00 of 255 in 8 frames"),
    "frozen with the decoder's noise": (lambda: grainy(still(), 1), "frozen: no part"),
    "noise of pixels": (white_noise, "noise: 8 of 8 frames are nothing else: neighbouring pixels correlate"),
    "grey noise of pixels": (lambda: np.repeat(white_noise()[..., :1], 3, axis=3), "noise: 8 of 8"),
    "noise of latents": (noise_of_latents, "noise: "),
    "faint noise of latents": (lambda: noise_of_latents(contrast=25), "noise: "),
}


@pytest.mark.parametrize(("clip", "expected"), BROKEN.values(), ids=BROKEN.keys())
def test_it_is_said_of(clip: Callable[[], Frames], expected: str) -> None:
    assert (verdict(clip()) or "").startswith(expected)


def test_pixels_that_were_not_numbers_are_reported_in_any_case() -> None:
    measures = Measures()
    measures.add(pan())
    measures.add(pan(), finite=False)
    assert measures.verdict() == "not finite: 8 of 16 frames have pixels that are not numbers"


def test_one_section_of_noise_in_four_is_reported() -> None:
    measures = Measures()
    for section in (white_noise(), pan(), pan(), pan()):
        measures.add(section)
    assert (measures.verdict() or "").startswith("noise: 8 of 32 frames")


def test_a_video_of_a_picture_of_confetti_or_of_one_colour_may_be_the_same() -> None:
    for frames in (noise_of_latents(), grainy(colour(0, 0, 0), 1)):
        measures = Measures()
        measures.add(frames)
        assert measures.verdict() is not None
        assert not (measures.verdict(frames[0]) or "").startswith(("noise", "black"))
        assert measures.verdict(pan()[0]) == measures.verdict()


def test_before_the_first_frame_there_is_nothing_to_say() -> None:
    assert Measures().verdict() is None


def test_a_frozen_section_in_a_moving_video_is_not_a_frozen_video() -> None:
    assert verdict(np.concatenate([still(), pan()])) is None


MIXED = np.concatenate(
    [pan()[:3], still()[:3], noise_of_latents()[:2], colour(0, 0, 0)[:2], white_noise()[:2]]
)
STILL = grainy(still(), 1)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), clip=st.sampled_from([MIXED, STILL]))
def test_neither_order_nor_portions_nor_a_crash_between_them_change_the_verdict(
    data: st.DataObject, clip: Frames
) -> None:
    whole = Measures()
    whole.add(clip)
    order = data.draw(st.permutations(range(len(clip))))
    measures = Measures()
    while order:
        count = data.draw(st.integers(1, len(order)))
        measures.add(clip[order[:count]])
        order = order[count:]
        measures = Measures.from_json(json.loads(json.dumps(measures.to_json())))
    assert measures.to_json() == whole.to_json()
    assert measures.verdict() == whole.verdict()


def test_a_checkpoint_of_a_moving_video_holds_a_few_numbers() -> None:
    measures = Measures()
    measures.add(pan())
    assert len(json.dumps(measures.to_json())) < 250
