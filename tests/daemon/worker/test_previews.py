"""Pictures of the section being sampled: they show it, and nothing waits for them or depends on them."""

import errno
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from framepack_core.engine import Step
from framepack_core.media import pictures
from framepack_core.media.latent_preview import CELL_PIXELS, Colours, contact_sheet
from framepack_core.networks.taehv import TinyDecoder
from framepackd.settings.config import changed
from framepackd.supervisor.supervisor import Supervisor
from framepackd.worker import previews
from framepackd.worker.main import answer
from framepackd.worker.messages import Finished, StepDone, Stopped, Work
from tests.conftest import KINDS
from tests.core.networks.taehv import as_published
from tests.daemon.intake.taken import taken
from tests.daemon.worker.jobs import ENGINES, LeavingEars, made, run, work_in


@pytest.fixture(params=sorted(KINDS))
def work(request: pytest.FixtureRequest, tmp_path: Path) -> Work:
    return work_in(tmp_path, transformer=request.param, steps=4)


def picture_of(work: Work) -> Path:
    return work.preview.with_name("preview.png")


@pytest.fixture
def at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw whenever the thread is free."""
    monkeypatch.setattr(previews, "EVERY_SECONDS", 0.0)


@pytest.fixture
def every_picture(at_every_step: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each step wait until its picture is drawn."""

    class Waiting(ThreadPoolExecutor):
        def submit(self, *task: Any) -> Future[Any]:  # type: ignore[override] # as it is called here
            drawing = super().submit(*task)
            drawing.result()
            return drawing

    monkeypatch.setattr(previews, "ThreadPoolExecutor", Waiting)


def left_after(work: Work, last: tuple[int, int]) -> None:
    """Generate until a step of a section."""
    ears = LeavingEars(lambda said: isinstance(said, StepDone) and (said.section, said.step) == last)
    assert answer(work, ENGINES, ears.theirs) == Stopped()


def latents_after(work: Work, last: tuple[int, int]) -> tuple[torch.Tensor, Colours]:
    """Give what a step of a section had come to, and the colours of the start picture."""
    engine = ENGINES.get(work, 0)
    conditioned = engine.encode(work.request)
    picture = pictures.crop_to(pictures.open_picture(work.request.image), work.size)
    for event in engine.sample(work.request, conditioned):
        if isinstance(event, Step) and (event.section + 1, event.step) == last:
            break
    return event.denoised, Colours.fit(conditioned.start_latents.numpy(), picture)


@pytest.mark.parametrize("last", [(1, 1), (1, 3), (2, 2)])
def test_the_picture_shows_the_section_at_hand_as_a_step_left_it(
    work: Work, every_picture: None, last: tuple[int, int]
) -> None:
    left_after(work, last)
    latents, colours = latents_after(work, last)
    expected = contact_sheet(colours.frames(latents.numpy()))
    assert np.array_equal(np.asarray(Image.open(picture_of(work))), expected)


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    file = tmp_path / "taehv.safetensors"
    save_file(as_published(), file)
    return file


def test_with_a_tiny_decoder_the_picture_is_what_it_decodes(
    work: Work, decoder: Path, every_picture: None
) -> None:
    work = replace(work, preview_decoder=decoder)
    left_after(work, (2, 2))
    latents, _ = latents_after(work, (2, 2))
    expected = contact_sheet(TinyDecoder.load(decoder).frames(latents, CELL_PIXELS))
    assert np.array_equal(np.asarray(Image.open(picture_of(work))), expected)


def test_jobs_that_start_after_a_reload_are_drawn_with_its_decoder(tmp_path: Path, decoder: Path) -> None:
    place, job = taken(tmp_path / "place", "")
    supervisor = Supervisor(place.config, place.store)
    assert supervisor.work_of(job).preview_decoder is None
    new, keys, _ = changed(place.config, place.config.model_copy(update={"preview_decoder": decoder}))
    supervisor.config = new
    assert keys == ["preview_decoder"]
    assert supervisor.work_of(job).preview_decoder == decoder


@pytest.mark.parametrize("spoil", [Path.unlink, lambda file: file.write_bytes(b"<html>")])
def test_without_a_decoder_that_is_one_the_log_says_so_once_and_pictures_are_drawn_as_ever(
    work: Work,
    decoder: Path,
    every_picture: None,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Path], object],
) -> None:
    spoil(decoder)
    left_after(replace(work, preview_decoder=decoder), (2, 2))
    latents, colours = latents_after(work, (2, 2))
    expected = contact_sheet(colours.frames(latents.numpy()))
    assert np.array_equal(np.asarray(Image.open(picture_of(work))), expected)
    assert caplog.text.count("previews are drawn without it") == 1
    assert f"preview_decoder: {decoder} " in caplog.text


def test_a_picture_that_takes_long_is_given_up_when_the_job_is_done(
    work: Work, decoder: Path, at_every_step: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each job would end as much later as a picture takes."""
    drawn = threading.Event()
    begun: list[bool] = []

    def endless(self: TinyDecoder, latents: torch.Tensor, side: int, between: Callable[[], None]) -> None:
        begun.append(True)
        while not drawn.wait(0.01):
            between()

    monkeypatch.setattr(TinyDecoder, "frames", endless)
    threading.Timer(60, drawn.set).start()  # a test that fails ends as well
    assert isinstance(run(replace(work, preview_decoder=decoder))[0], Finished)
    assert not drawn.is_set()
    drawn.set()
    assert begun == [True], "the others were left out"
    assert [path.name for path in work.preview.parent.glob("*preview*")] == ["preview.mp4"]


def test_drawing_leaves_the_threads_that_sample_as_they_are(
    work: Work, decoder: Path, every_picture: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their number may change the last bits of a video, their priority its speed."""
    own = torch.get_num_threads()
    drawing: list[tuple[int, int]] = []
    frames = TinyDecoder.frames

    def noting(self: TinyDecoder, *arguments: Any) -> pictures.Picture:
        drawing.append((torch.get_num_threads(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
        return frames(self, *arguments)

    monkeypatch.setattr(TinyDecoder, "frames", noting)
    torch.set_num_threads(2)
    try:
        before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
        left_after(replace(work, preview_decoder=decoder), (1, 2))
        assert set(drawing) == {(1, previews.LOWEST_PRIORITY)}
        assert torch.get_num_threads() == 2
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
    finally:
        torch.set_num_threads(own)


def draw_nothing(*_: object) -> None:
    pass


def test_with_and_without_pictures_the_video_has_the_same_bits(
    every_picture: None, decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for drawing in ("decoded", "coloured", "none"):
        if drawing == "none":
            monkeypatch.setattr(previews.Previews, "offer", draw_nothing)
        work = work_in(tmp_path / drawing, steps=4)
        work = replace(work, preview_decoder=decoder if drawing == "decoded" else None)
        assert isinstance(run(work)[0], Finished)
        assert picture_of(work).exists() == (drawing != "none")
        results.append(made(work))
    assert results[0] == results[1] == results[2]


def test_no_step_waits_for_a_picture(
    work: Work, at_every_step: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is not done before the last step is: a sampler that waited would wait for ever."""
    sampled = threading.Event()
    drawn: list[bool] = []

    def slow(frames: pictures.Picture) -> pictures.Picture:
        drawn.append(sampled.wait(30))
        return contact_sheet(frames)

    def note(said: object) -> bool:
        if isinstance(said, StepDone) and (said.section, said.step) == (work.sections, 4):
            sampled.set()
        return False

    monkeypatch.setattr(previews, "contact_sheet", slow)
    assert isinstance(answer(work, ENGINES, LeavingEars(note).theirs), Finished)
    assert drawn[0], "the steps went on while it was drawn"
    assert len(drawn) <= 2, "the others were left out"


def test_pictures_are_drawn_no_more_often_than_people_look(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def counting(frames: pictures.Picture) -> pictures.Picture:
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
    monkeypatch.setattr(pictures, "write_picture", lambda *_: None)  # of stills, by the same library
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
