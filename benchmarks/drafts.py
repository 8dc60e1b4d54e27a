"""Measures on the demo model what a draft costs, and whether a person can choose by it: whose final is near.

For each seed the draft and the final are made. A final is known by its draft if no other seed's draft is
nearer, by the RMS difference of their pixels. The demo model says that the same noise gives the same
motion in fewer steps, not which of the real model's faults a draft shows.
"""

import os
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np

from benchmarks import Row
from framepack_core.engine import Clip, Engine, Step
from framepack_core.media.pictures import Frames
from framepack_core.models.registry import BUILT_IN
from framepack_core.request import GenerationSettings, Request
from framepackd.settings.tables import DraftConfig

# Beside that of the defaults. Those with a cache stand beside as many steps without one.
CHEAP = (
    (5, "none"),
    (8, "none"),
    (12, "none"),
    (8, "teacache"),
    (10, "teacache"),
    (12, "teacache"),
    (25, "teacache"),
)


def rows() -> Iterator[Row]:
    """Compare ways to make a draft cheap, the one in use first."""
    tiny = os.environ.get("FRAMEPACKD_BENCHMARK") == "tiny"
    seeds = range(3 if tiny else 20)
    usual, chosen = GenerationSettings(), DraftConfig()
    engine = Engine.load(BUILT_IN["demo"])
    full = [generate(engine, seed, usual.steps, usual.cache) for seed in seeds]
    finals = [frames for frames, _ in full]
    for steps, cache in ((chosen.steps, chosen.cache), *(() if tiny else CHEAP)):
        made = [generate(engine, seed, steps, cache) for seed in seeds]
        drafts = [frames for frames, _ in made]
        name = f"{steps} steps, cache {cache}"
        yield Row(
            f"{name}: steps computed",
            sum(computed for _, computed in made),
            sum(c for _, c in full),
            "",
            "cost",
        )
        near = nearest(finals, drafts)
        known = sum(draft == number for number, draft in enumerate(near))
        yield Row(
            f"{name}: finals nearest to their own draft", known, len(seeds), "", "a draft shows its final"
        )
        own, other = distances(finals, drafts)
        yield Row(
            f"{name}: RMS to the own draft, the next one as baseline", own, other, "of 255", "how clearly"
        )


def generate(
    engine: Engine, seed: int, steps: int, cache: str, *, size: tuple[int, int] = (96, 128)
) -> tuple[Frames, int]:
    """Make a short video; gives its frames, and how many steps were computed."""
    picture = Path(str(files("framepackd").joinpath("demo/lake.png")))
    request = Request(
        image=picture,
        prompt="wind",
        seconds=1,
        seed=seed,
        steps=steps,
        cache=cache,
        height=size[0],
        width=size[1],
    )
    frames, computed = [], 0
    for event in engine.generate(request):
        if isinstance(event, Step):
            computed += event.computed
        if isinstance(event, Clip):
            frames.append(event.frames)
    return np.concatenate(frames[::-1]), computed


def nearest(finals: Sequence[Frames], drafts: Sequence[Frames]) -> list[int]:
    """Give for each final the number of the draft whose pixels are nearest."""
    return [int(np.argmin([rms(final, draft) for draft in drafts])) for final in finals]


def distances(finals: Sequence[Frames], drafts: Sequence[Frames]) -> tuple[float, float]:
    """Give the mean distance of finals to their own draft, and to the nearest of the others."""
    own = [rms(final, drafts[number]) for number, final in enumerate(finals)]
    others = [
        min(rms(final, draft) for other, draft in enumerate(drafts) if other != number)
        for number, final in enumerate(finals)
    ]
    return float(np.mean(own)), float(np.mean(others))


def rms(one: Frames, other: Frames) -> float:
    """Give the root of the mean squared difference of the pixels."""
    return float(np.sqrt(np.mean((one.astype(np.float32) - other.astype(np.float32)) ** 2)))
