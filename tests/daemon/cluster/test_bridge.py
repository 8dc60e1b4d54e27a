"""A remote card does a job as a worker of this machine would."""

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from framepack_core.media.pictures import count_frames
from framepack_core.models.registry import Source
from framepack_core.request import Lora
from framepackd.cluster import wire
from framepackd.jobs.folder import CONTINUED
from framepackd.worker import messages
from framepackd.worker.messages import Finished, Work, Written
from framepackd.worker.source_video import START, TAIL, Continued
from framepackd.worker.video import Video
from tests.core.models.loras import make_lora, stored
from tests.daemon.cluster.jobs import PATIENCE, Card, done_on, front_work, greeted, heard, is_end, own_of
from tests.daemon.worker.jobs import chain_in, made, run, work_in


def with_end_frame(folder: Path) -> Work:
    work = work_in(folder)
    Image.new("RGB", (48, 32), "red").save(folder / "end.png")
    return replace(work, request=work.request.model_copy(update={"end_image": folder / "end.png"}))


def with_lora(folder: Path) -> Work:
    work = work_in(folder)
    file = folder.parent.parent / "loras" / "oil.safetensors"
    file.parent.mkdir(exist_ok=True)
    make_lora(file, "kohya-hunyuan", stored(work.spec))
    return replace(work, request=work.request.model_copy(update={"loras": (Lora(file=file, weight=0.7),)}))


def with_strip_and_no_stills(folder: Path) -> Work:
    return replace(work_in(folder), filmstrip=True, save_section_frames=False, keep_latents=False)


def extending(folder: Path) -> Work:
    """A job that extends a video, which the node decodes again."""
    work = work_in(folder, transformer="framepack-f1")
    before = work_in(folder.parent.parent / "before", transformer="framepack-f1")
    run(before)
    video = folder / "clip.mp4"
    shutil.copy(before.result / ".mp4", video)
    continued = Continued(
        video=str(folder / "inputs" / video.name),
        folder=str(folder / CONTINUED),
        frames=count_frames(video),
        latents=None,
        window=work.request.latent_window_size,
        size=work.size,
        crf=work.crf,
    )
    request = work.request.model_copy(
        update={"image": folder / CONTINUED / START, "continue_from": folder / CONTINUED / TAIL}
    )
    return replace(work, request=request, continued=continued, frames=continued.frames + work.frames - 1)


@pytest.mark.parametrize(
    "make", [work_in, with_end_frame, with_lora, with_strip_and_no_stills, chain_in, extending]
)
def test_a_job_on_a_remote_card_is_the_same_as_on_this_machine(
    tmp_path: Path, make: Callable[[Path], Work]
) -> None:
    alone = front_work(tmp_path / "alone", make)
    _, said = run(alone)
    work = front_work(tmp_path / "front", make)
    told = done_on(own_of(tmp_path / "node"), work)
    assert isinstance(told[-1], Written), told[-1]
    assert isinstance(told[-1].reply, Finished)
    assert [type(message) for message in told] == [
        *(type(message) for message in said),
        messages.Sampled,
        messages.Written,
    ]
    assert made(work) == made(alone)
    assert (work.preview.exists(), work.preview.with_suffix(".png").exists()) == (True, True)


def test_the_next_job_is_begun_while_the_video_of_the_first_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = threading.Event()
    write = Video.write

    def waiting(video: Video, *arguments: Any) -> None:
        assert allowed.wait(PATIENCE)
        write(video, *arguments)

    alone = work_in(tmp_path / "alone")
    run(alone)
    monkeypatch.setattr(Video, "write", waiting)
    works = [front_work(tmp_path / "front", job=f"20260101-000000-aaaaa{number}") for number in range(2)]
    card = greeted(own_of(tmp_path / "node"))
    card.daemon.send(works[0])
    heard(card.daemon, lambda message: isinstance(message, messages.Sampled))
    card.daemon.send(works[1])
    told = heard(card.daemon, lambda message: isinstance(message, messages.StepDone))
    assert not any(isinstance(message, Written) for message in told)
    allowed.set()
    for _ in works:
        told += heard(card.daemon, lambda message: isinstance(message, Written))
    card.end()
    assert [made(work) for work in works] == [made(alone)] * 2


def test_a_job_that_is_left_goes_on_where_it_was_and_sends_only_what_the_node_lacks(tmp_path: Path) -> None:
    work, own = front_work(tmp_path / "front"), own_of(tmp_path / "node")
    card = greeted(own)
    card.daemon.send(work)
    heard(card.daemon, lambda message: isinstance(message, messages.StepDone))
    card.daemon.send(messages.Leave())
    assert isinstance(heard(card.daemon, is_end)[-1], messages.Stopped)
    card.daemon.send(work)
    told = heard(card.daemon, is_end)
    card.end()
    assert isinstance(told[0], messages.Resumed)
    assert told[0].steps > 0
    assert isinstance(told[-1], Written)
    lacks = [wire.unpacked(frame).header for frame in card.arrived if b'"Lacks"' in frame[:80]]
    assert [header["names"] for header in lacks] == [["inputs/image.png"], []]


def test_a_job_that_is_cancelled_and_kept_has_what_exists_of_it(tmp_path: Path) -> None:
    work = front_work(tmp_path / "front")
    card = greeted(own_of(tmp_path / "node"))
    card.daemon.send(work)
    heard(card.daemon, lambda message: isinstance(message, messages.SectionDecoded))
    card.daemon.send(messages.Leave(keep=True))
    told = heard(card.daemon, is_end)
    assert isinstance(told[-1], Finished), told
    kept = made(work)
    assert 0 < count_frames(work.result / ".mp4") < work.frames
    card.daemon.send(replace(work, keep_only=True))
    told = heard(card.daemon, is_end)
    card.end()
    assert isinstance(told[-1], Finished), told
    assert made(work) == kept


def test_a_wish_to_leave_that_comes_before_the_node_has_the_files_is_heard(tmp_path: Path) -> None:
    card = greeted(own_of(tmp_path / "node"))
    card.daemon.send(front_work(tmp_path / "front"))
    card.daemon.send(messages.Leave())
    told = heard(card.daemon, is_end)
    card.end()
    assert isinstance(told[-1], messages.Stopped)
    assert not any(isinstance(message, messages.StepDone) for message in told)


def test_a_node_says_which_models_it_has(tmp_path: Path) -> None:
    own = own_of(tmp_path / "node")
    there = own.models["framepack-i2v"]
    gone = replace(there, name="gone", transformer=Source(str(tmp_path / "nothing")))
    card = Card(replace(own, models={"here": there, "gone": gone}))
    (hello,) = heard(card.daemon, lambda _: True)
    assert isinstance(hello, messages.Hello)
    assert hello.models == ("here",)
    card.end()


def test_the_video_of_a_job_arrives_although_others_begin_and_fail_beside_its_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [f"20260101-000000-{letter * 6}" for letter in "abc"]
    first, wrong, last = (front_work(tmp_path, job=job) for job in jobs)
    wrong.request.image.write_bytes(b"no picture")
    allowed, write = threading.Event(), Video.write

    def write_late(video: Video, *arguments: Any) -> None:
        assert allowed.wait(PATIENCE)
        write(video, *arguments)

    monkeypatch.setattr(Video, "write", write_late)
    card = greeted(own_of(tmp_path / "node"))
    card.daemon.send(first)
    heard(card.daemon, lambda message: isinstance(message, messages.Sampled))
    card.daemon.send(wrong)
    heard(card.daemon, lambda message: isinstance(message, messages.Failed))
    card.daemon.send(last)
    heard(card.daemon, lambda message: isinstance(message, messages.StepDone))
    allowed.set()
    for _ in range(2):
        told = heard(card.daemon, lambda message: isinstance(message, Written))
        assert isinstance(told[-1], Written)
        assert isinstance(told[-1].reply, Finished)
    card.end()
    assert all(".mp4" in made(work) for work in (first, last))
