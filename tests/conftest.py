"""What tests of both packages share: the tiny models, loaded once."""

import os
from collections.abc import Callable, Generator, Iterable
from functools import cache

import numpy as np
import pytest

from framepack_core.engine import Clip, Engine, Step
from framepack_core.media import Frames
from framepack_core.models import ModelSpec, Source
from framepack_core.sections import Kind, chronological
from tests.golden import TINY_MODELS

KINDS: dict[str, Kind] = {"framepack-i2v": "framepack", "framepack-f1": "f1"}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI nothing is skipped for want of something: what the tests need is installed there."""
    report = yield
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report


def tiny_spec(transformer: str = "framepack-i2v") -> ModelSpec:
    """Name one of the tiny models as a config would: local folders."""
    return ModelSpec(
        name=transformer,
        kind=KINDS[transformer],
        transformer=Source(str(TINY_MODELS / transformer)),
        base=Source(str(TINY_MODELS / "hunyuanvideo")),
        image_encoder=Source(str(TINY_MODELS / "flux_redux")),
    )


@pytest.fixture(scope="session")
def tiny_engine() -> Callable[[str], Engine]:
    """Load a tiny model by the name of its transformer, float32 on the CPU."""
    return cache(lambda transformer: Engine.load(tiny_spec(transformer), device="cpu"))


def whole_video(engine: Engine, events: Iterable[Step | Clip]) -> Frames:
    """Join the frames of all clips of a video, (T, H, W, 3)."""
    parts = [event.frames for event in events if isinstance(event, Clip)]
    return np.concatenate(chronological(engine.models.spec.kind, parts))
