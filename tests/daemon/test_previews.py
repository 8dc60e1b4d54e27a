"""Pictures of the section being sampled: they show it, and nothing waits for them or depends on them."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from framepack_core import media
from framepack_core.engine import Step
from framepack_core.preview import Colours, contact_sheet
from framepackd import previews
from framepackd.worker import Finished, StepDone, Stopped, Work, _answer
from tests.conftest import KINDS
from tests.daemon.test_generation import ENGINES, made, run, work_in
from tests.daemon.test_video import LeavingEars


@pytest.fixture(params=sorted(KINDS))
def work(request: pytest.FixtureRequest, tmp_path: Path) -> Work:
    return work_in(tmp_path, transformer=request.param, steps=4)


def picture_of(work: Work) -> Path:
    return work.preview.with_name("preview.png")


@pytest.fixture
def at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw whenever the thread is free."""
    monkeypatch.setattr(previews, "EVERY_SECONDS", 0.0)


@pytest.mark.parametrize("last", [(1, 1), (1, 3), (2, 2)])
def test_the_picture_shows_the_section_at_hand_as_a_step_left_it(
    work: Work, at_every_step: None, monkeypatch: pytest.MonkeyPatch, last: tuple[int, int]
) -> None:
    offer = previews.Previews.offer

    def waiting(self: previews.Previews, copied: Any) -> None:
        offer(self, copied)
        self._drawing.result()  # type: ignore[union-attr] # there is one: none was left out

    monkeypatch.setattr(previews.Previews, "offer", waiting)
    ears = LeavingEars(lambda said: isinstance(said, StepDone) and (said.section, said.step) == last)
    assert _answer(work, ENGINES, ears.theirs) == Stopped()

    engine = ENGINES.get(work, 0)
    conditioned = engine.encode(work.request)
    picture = media.crop_to(media.open_picture(work.request.image), work.size)
    colours = Colours.fit(conditioned.start_latents.numpy(), picture)
    for event in engine.sample(work.request, conditioned):
        if isinstance(event, Step) and (event.section + 1, event.step) == last:
            break
    expected = contact_sheet(colours.frames(event.denoised.numpy()))
    assert np.array_equal(np.asarray(Image.open(picture_of(work))), expected)


def draw_nothing(*_: object) -> None:
    pass


def test_with_and_without_pictures_the_video_has_the_same_bits(
    at_every_step: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for drawing in (True, False):
        if not drawing:
            monkeypatch.setattr(previews.Previews, "offer", draw_nothing)
        work = work_in(tmp_path / str(drawing), steps=4)
        assert isinstance(run(work)[0], Finished)
        assert picture_of(work).exists() == drawing
        results.append(made(work))
    assert results[0] == results[1]


def test_no_step_waits_for_a_picture(
    work: Work, at_every_step: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is not done before the last step is: a sampler that waited would wait for ever."""
    sampled = threading.Event()
    drawn: list[bool] = []

    def slow(frames: media.Picture) -> media.Picture:
        drawn.append(sampled.wait(30))
        return contact_sheet(frames)

    def note(said: object) -> bool:
        if isinstance(said, StepDone) and (said.section, said.step) == (work.sections, 4):
            sampled.set()
        return False

    monkeypatch.setattr(previews, "contact_sheet", slow)
    assert isinstance(_answer(work, ENGINES, LeavingEars(note).theirs), Finished)
    assert drawn[0], "the steps went on while it was drawn"
    assert len(drawn) <= 2, "the others were left out"


def test_pictures_are_drawn_no_more_often_than_people_look(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def counting(frames: media.Picture) -> media.Picture:
        drawn.append(len(frames))
        return contact_sheet(frames)

    monkeypatch.setattr(previews, "EVERY_SECONDS", 1000.0)
    monkeypatch.setattr(previews, "contact_sheet", counting)
    assert isinstance(run(work)[0], Finished)
    assert drawn == [3], "one picture, of a section of three frames of latents"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), MemoryError(), ValueError("planted")]
)
def test_a_job_does_without_pictures_that_cannot_be_made_and_says_so_once(
    work: Work,
    at_every_step: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    def failing(self: Image.Image, file: Path, *_: object, **__: object) -> None:
        file.write_bytes(b"what there was room for")
        raise error

    monkeypatch.setattr(previews.Image.Image, "save", failing)
    monkeypatch.setattr(media, "write_picture", lambda *_: None)  # of stills, by the same library
    assert isinstance(run(work)[0], Finished)
    assert caplog.text.count("there is no preview of what is sampled") == 1
    assert [path.name for path in work.preview.parent.glob("*preview*")] == ["preview.mp4"]


def test_a_video_that_begins_again_has_no_picture_of_another(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture_of(work).write_bytes(b"of another version")
    monkeypatch.setattr(previews.Previews, "offer", draw_nothing)
    assert isinstance(run(work)[0], Finished)
    assert not picture_of(work).exists()
