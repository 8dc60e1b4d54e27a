"""What tests of both packages share: the tiny models, loaded once."""

import gc
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from framepack_core.engine import Clip, Engine, Step
from framepack_core.media.pictures import Frames
from framepack_core.sections import chronological
from tests.golden.replay import KINDS as KINDS  # for tests, which have it from here
from tests.golden.replay import tiny_spec as tiny_spec
from tests.started.forking import NOT_WANTED, served


def pytest_configure(config: pytest.Config) -> None:
    """Fork the workers of all daemons from one process, which the processes of the tests share."""
    gc.disable()
    if not hasattr(config, "workerinput") and NOT_WANTED not in os.environ:
        forking = ExitStack()
        forking.enter_context(served())
        config.add_cleanup(forking.close)


def pytest_collection_finish() -> None:
    """Look for garbage in what tests make, not in the millions of objects that were imported for them."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI nothing is skipped for want of something: what the tests need is installed there."""
    report = yield
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI: {report.longrepr}"
    return report


@pytest.fixture(scope="session", autouse=True)
def lean_processes() -> Iterator[None]:
    """Have each Python that a test starts leave out what ``started/sitecustomize.py`` says."""
    places = [str(Path(__file__).parent / "started"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join(places))
        yield


@pytest.fixture(scope="session")
def tiny_engine() -> Callable[[str], Engine]:
    """Load a tiny model by the name of its transformer, float32 on the CPU."""
    return cache(lambda transformer: Engine.load(tiny_spec(transformer), device="cpu"))


def whole_video(engine: Engine, events: Iterable[Step | Clip]) -> Frames:
    """Join the frames of all clips of a video, (T, H, W, 3)."""
    parts = [event.frames for event in events if isinstance(event, Clip)]
    return np.concatenate(chronological(engine.models.spec.kind, parts))
