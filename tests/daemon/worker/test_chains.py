"""A chain of frames: one clip for each neighbouring pair, one video, whatever happens on the way."""

import io
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from rich.console import Console

from framepack_core.engine import Engine
from framepack_core.media.pictures import count_frames
from framepack_core.sections import frame_count
from framepackd.cli import display
from framepackd.control import commands
from framepackd.control.status import in_one_line, snapshot
from framepackd.delivery import deliveries
from framepackd.folders import MARKER
from framepackd.intake import resolve, take_back
from framepackd.jobs import folder as work_folder
from framepackd.jobs.job import Job, State
from framepackd.supervisor.work import clips
from framepackd.worker import engines, video
from framepackd.worker.engines import Engines
from framepackd.worker.generation import Generation
from framepackd.worker.main import answer
from framepackd.worker.messages import (
    Finished,
    Leave,
    Lowered,
    Message,
    Resumed,
    SectionDecoded,
    StepDone,
    Stopped,
    Work,
)
from tests.daemon.place import Place
from tests.daemon.worker.jobs import (
    ENGINES,
    SECTIONS,
    STEPS,
    WINDOW,
    Cut,
    Ears,
    LeavingEars,
    PowerCut,
    chain_in,
    made,
    run,
    told_steps,
)

PER_CLIP = frame_count(SECTIONS, WINDOW)


def clip_of(work: Work, number: int, folder: Path) -> Work:
    """One clip of a chain as a job of its own."""
    return replace(
        work,
        request=work.clips[number],
        following=(),
        sections=SECTIONS,
        frames=PER_CLIP,
        result=folder / "result",
        checkpoint=folder / "checkpoint",
        preview=folder / "preview.mp4",
    )


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return chain_in(tmp_path / "chain")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Work, list[Message]]:
    """A chain of two clips without incident."""
    work = chain_in(tmp_path_factory.mktemp("whole"))
    answer, messages = run(work)
    assert isinstance(answer, Finished)
    assert answer.quality is None
    return work, messages


def pixels(path: Path) -> np.ndarray[Any, Any]:
    with av.open(path) as container:
        return np.stack([frame.to_ndarray() for frame in container.decode(video=0)])


def interrupted(work: Work, at_message: int, monkeypatch: pytest.MonkeyPatch) -> list[Message]:
    """Run a chain until the power goes, and give what was told before."""
    ears = Ears()
    with monkeypatch.context() as patched:
        patched.setattr(ears, "theirs", Cut(ears.theirs, at_message))
        with pytest.raises(PowerCut):
            Generation(work, ENGINES, ears.theirs).run()
    return ears.heard()


def test_the_video_is_that_of_its_clips_with_each_shared_frame_once(tmp_path: Path) -> None:
    work = replace(chain_in(tmp_path / "chain", frames=4), crf=0)  # lossless: frames can be compared
    assert isinstance(run(work)[0], Finished)
    parts = []
    for number in range(3):
        clip = clip_of(work, number, tmp_path / str(number))
        (tmp_path / str(number)).mkdir()
        assert isinstance(run(clip)[0], Finished)
        parts.append(pixels(clip.result / ".mp4"))
        assert len(parts[-1]) == PER_CLIP
        latents = safetensors.torch.load_file(clip.result / ".latents.safetensors")["latents"]
        kept = safetensors.torch.load_file(work.result / f".clip-{number + 1}.latents.safetensors")["latents"]
        assert latents.equal(kept)
        for section in range(SECTIONS):
            still = (clip.result / f".section-{section}.png").read_bytes()
            assert still == (work.result / f".section-{number * SECTIONS + section}.png").read_bytes()
    joined = pixels(work.result / ".mp4")
    expected = np.concatenate([parts[0], *(part[1:] for part in parts[1:])])
    assert len(joined) == work.frames == 3 * (PER_CLIP - 1) + 1
    assert np.array_equal(joined, expected)


def test_steps_and_sections_are_counted_over_all_clips(whole: tuple[Work, list[Message]]) -> None:
    _, messages = whole
    assert messages[0] == Resumed(0, (0, 0))
    assert told_steps(messages) == [(section, step) for section in (1, 2, 3, 4) for step in (1, 2)]
    assert [m.section for m in messages if isinstance(m, SectionDecoded)] == [1, 2, 3, 4]


def test_interrupted_after_any_message_the_video_is_the_same_and_no_step_is_repeated(
    whole: tuple[Work, list[Message]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, messages = made(whole[0]), whole[1]
    points = [n for n, message in enumerate(messages) if isinstance(message, StepDone | SectionDecoded)]
    for number in points[SECTIONS * STEPS :]:  # before that it is a job like any other
        work = chain_in(tmp_path / str(number))
        before = interrupted(work, number, monkeypatch)
        answer, after = run(work)
        assert isinstance(answer, Finished)
        assert made(work) == expected, f"interrupted at message {number}"
        steps = told_steps(before) + told_steps(after)
        lost = isinstance(messages[number], StepDone)  # it was not told, and may be told again or not
        assert len(steps) - len(set(steps)) <= (0 if lost else 1)
        assert isinstance(after[0], Resumed)
        assert set(told_steps(messages)) - set(steps) <= {told_steps(messages)[after[0].steps - 1]}


def test_where_a_finished_clip_is_damaged_it_is_made_again_and_the_next_resumes(
    whole: tuple[Work, list[Message]], work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(work, len(whole[1]) - 1, monkeypatch)  # before it is told that the last section is decoded
    (work.checkpoint / "clip-0001" / "segment-0001").write_bytes(b"damaged")
    answer, messages = run(work)
    assert isinstance(answer, Finished)
    assert messages[1] == Resumed(2 * SECTIONS * STEPS, (SECTIONS * STEPS, SECTIONS * STEPS))
    assert not told_steps(messages), "the latents of all sections are whole"
    assert made(work) == made(whole[0])


def test_told_to_keep_what_exists_the_finished_clips_are_whole(work: Work) -> None:
    """The end of the second clip follows on the first: what lies between is not made."""
    ears = Ears()

    class Teller:
        """Asks to leave and keep at a step of the second clip's second section."""

        def __init__(self) -> None:
            self.poll, self.recv = ears.theirs.poll, ears.theirs.recv

        def send(self, message: Message) -> None:
            if message == replace_seconds(message, section=4, step=1):
                ears.ours.send(Leave(keep=True))

    answer = Generation(work, ENGINES, Teller()).run()  # type: ignore[arg-type] # speaks like a connection
    assert isinstance(answer, Finished)
    assert count_frames(work.result / ".mp4") == PER_CLIP + 4 * WINDOW - 3


def replace_seconds(message: Message, *, section: int, step: int) -> StepDone | None:
    return StepDone(section, step, message.seconds) if isinstance(message, StepDone) else None


def test_a_chain_cancelled_between_two_clips_keeps_the_first(
    whole: tuple[Work, list[Message]], work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = told_steps(whole[1]).index((3, 1))
    steps = [n for n, message in enumerate(whole[1]) if isinstance(message, StepDone)]
    interrupted(work, steps[second], monkeypatch)
    answer, _ = run(replace(work, keep_only=True))
    assert isinstance(answer, Finished)
    assert count_frames(work.result / ".mp4") == PER_CLIP


def test_the_preview_grows_over_the_clips(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    write = video.Video.write_preview

    def look(self: video.Video, edge: Any) -> None:
        write(self, edge)
        seen.append(count_frames(work.preview))

    monkeypatch.setattr(video.Video, "write_preview", look)
    assert isinstance(run(work)[0], Finished)
    assert len(seen) == 2 * SECTIONS - 1, "instead of the last one comes the video"
    assert seen == sorted(set(seen))
    assert seen[1] == PER_CLIP


def test_out_of_memory_in_the_first_clip_is_known_in_the_second(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, levels = Engine.sample, []

    def refuse_whole_frames(self: Engine, *arguments: Any) -> Iterator[Any]:
        levels.append(self.level)
        if self.level == 0:
            raise torch.OutOfMemoryError("planted")
        yield from sample(self, *arguments)

    monkeypatch.setattr(Engine, "sample", refuse_whole_frames)
    answer, messages = run(work, Engines())
    assert isinstance(answer, Finished)
    assert levels == [0, 1, 1]
    assert len([message for message in messages if isinstance(message, Lowered)]) == 1


def test_between_two_sections_the_next_clips_pictures_are_encoded(
    work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead: list[Path] = []
    monkeypatch.setattr(engines.Engines, "encode_ahead", lambda _, coming: ahead.append(coming.request.image))
    run(work)
    assert ahead == [work.clips[1].image] * SECTIONS, "after the last clip comes the next job: there is none"


def test_asked_to_leave_a_chain_stops_at_the_next_step(work: Work) -> None:
    ears = LeavingEars(lambda told: isinstance(told, StepDone))
    assert answer(work, ENGINES, ears.theirs) == Stopped()
    assert told_steps(ears.heard()) == [(1, 1)]


# in the daemon


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "place")


def drop(place: Place, *colours: str, settings: str = "") -> Job:
    """Drop a chain of pictures of one colour each and take it in."""
    for number, colour in enumerate(colours):
        size = (64, 48 + 16 * number)
        Image.new("RGB", size, colour).save(place.config.inbox / f"cat_frame_{number}.png")
    (place.config.inbox / "cat.txt").write_text("pan left")
    if settings:
        (place.config.inbox / "cat.toml").write_text(settings)
    return place.take()


def test_a_chain_is_one_job_whose_row_counts_all_clips(place: Place) -> None:
    job = drop(place, "red", "green", "blue", settings="seconds = 2\nsteps = 7")
    assert (job.clips, job.sections, job.frames, job.steps_total) == (2, 4, 2 * 72 + 1, 28)
    assert list(job.inputs) == ["frame-0", "frame-1", "frame-2", "text", "settings"]
    inputs = place.config.jobs_dir / job.id / work_folder.INPUTS
    pairs = [
        (clip.image.name, clip.end_image and clip.end_image.name)
        for clip in clips(job, inputs, place.config.lora_dir)
    ]
    assert pairs == [("cat_frame_0.png", "cat_frame_1.png"), ("cat_frame_1.png", "cat_frame_2.png")]
    sizes = {(clip.height, clip.width) for clip in clips(job, inputs, place.config.lora_dir)}
    assert sizes == {(job.height, job.width)}, "chosen for frame 0, the same for all"
    assert job.record()["clips"] == 2


def test_a_chain_on_a_model_that_generates_forward_fails_with_what_to_do(place: Place) -> None:
    job = drop(place, "red", "green", settings='model = "f1"')
    assert job.delivery is not None
    assert "model f1 generates forward" in job.delivery["error"]
    assert "use a model of kind framepack" in job.delivery["error"]


def test_a_chain_of_too_many_frames_fails_with_what_to_do(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "MAX_FRAMES", 3)
    assert drop(place, *["red"] * 3).delivery is None
    job = drop(place, *["red"] * 4)
    assert job.delivery is not None
    assert "cat is a chain of 4 frames, of which one may have 3" in job.delivery["error"]


def test_any_frame_of_a_chain_makes_it_another_job(place: Place) -> None:
    prints = {drop(place, "red", colour, "blue").fingerprint for colour in ("green", "white", "green")}
    assert len(prints) == 2


def test_a_failed_chain_comes_back_whole(place: Place) -> None:
    taken = drop(place, "red", "green", "blue")
    place.store.claim()
    place.store.decide(taken.id, State.FAILED, error="planted")
    deliveries.settle(place.store.get(taken.id), place.config, place.store, take_back.bring_back)
    frames = [f"cat_frame_{number}.png" for number in range(3)]
    names = sorted(path.name for path in place.config.failed.iterdir())
    assert names == [MARKER, "cat.error.txt", "cat.txt", *frames]
    request = {"command": "retry", "jobs": ["cat"]}
    (answer,) = commands.perform(request, commands.Queue(place.config, place.store))["results"]
    assert answer["done"], answer
    assert [path.name for path in place.config.failed.iterdir()] == [MARKER]
    inputs = place.config.jobs_dir / taken.id / work_folder.INPUTS
    assert sorted(path.name for path in inputs.iterdir()) == ["cat.txt", *frames]
    assert place.store.get(taken.id).inputs == taken.inputs


def test_status_says_which_clip_and_which_section_of_it(place: Place) -> None:
    job = drop(place, "red", "green", "blue", settings="seconds = 2\nsteps = 7")
    place.store.claim()
    place.store.step(job.id, section=3, step=2, seconds=1.0)
    daemon = {"state": "running", "pid": 1, "since": "2026-01-01T00:00:00Z", "paused": None}
    report = snapshot(place.store, (), daemon)
    assert report["jobs"][0]["clips"] == 2
    assert "cat: 53 %, clip 2/2, section 1/2, step 2/7" in in_one_line(report, datetime.now(UTC))
    out = io.StringIO()
    Console(file=out, width=200).print(display.status(report))
    assert "clip 2/2  section 1/2  step 2/7" in out.getvalue()
