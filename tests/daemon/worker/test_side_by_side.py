"""Clips of one chain made by several workers: the same video, whoever made which clip, whatever happens."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framepackd.worker import generation, identity
from framepackd.worker.generation import Generation
from framepackd.worker.main import answer
from framepackd.worker.messages import (
    Failed,
    Finished,
    Helped,
    Leave,
    Message,
    Ready,
    Resumed,
    Sampled,
    SectionDecoded,
    StepDone,
    Stopped,
    WaitsForClip,
    Work,
)
from framepackd.worker.quality import Measures
from tests.daemon.worker.jobs import (
    ENGINES,
    SECTIONS,
    STEPS,
    Cut,
    Ears,
    LeavingEars,
    PowerCut,
    chain_in,
    made,
    run,
    told_steps,
)

CLIPS = 3
OF_A_CLIP = [(section, step) for section in range(1, SECTIONS + 1) for step in range(1, STEPS + 1)]


def steps_of(*clips: int) -> list[tuple[int, int]]:
    """List the steps of some clips, counted from 1, as they are told."""
    return [((clip - 1) * SECTIONS + section, step) for clip in clips for section, step in OF_A_CLIP]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one worker makes of the chain."""
    work = chain_in(tmp_path_factory.mktemp("alone"), CLIPS + 1)
    assert isinstance(run(work)[0], Finished)
    return made(work)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return chain_in(tmp_path / "chain", CLIPS + 1)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "WAIT_SECONDS", 0.01)


def helper(work: Work) -> Work:
    return replace(work, helps=True)


def left_at(work: Work, when: StepDone | SectionDecoded) -> list[tuple[int, int]]:
    """Have a helper leave once it has told this, whatever time it took; gives the steps that it has done."""

    def same(told: Any) -> bool:
        return isinstance(told, type(when)) and replace(told, seconds=0.0) == when

    ears = LeavingEars(same)
    assert isinstance(answer(helper(work), ENGINES, ears.theirs), Stopped)
    return told_steps(ears.heard())


def test_a_helper_makes_clips_from_the_last_on_and_no_video(work: Work, expected: dict[str, bytes]) -> None:
    ended, told = run(helper(work))
    assert ended == Helped()
    assert told_steps(told) == steps_of(3, 2, 1)
    assert not any(isinstance(message, Resumed) for message in told), "it is no run of the job"
    assert ".mp4" not in made(work)
    assert not work.preview.exists()
    finished, told = run(work)
    assert isinstance(finished, Finished)
    assert told[0] == Resumed(CLIPS * len(OF_A_CLIP), (len(OF_A_CLIP),) * CLIPS)
    assert told_steps(told) == []
    assert made(work) == expected


def test_the_worker_of_the_job_makes_what_a_helper_has_left_and_repeats_no_step(
    work: Work, expected: dict[str, bytes]
) -> None:
    before = left_at(work, StepDone(2 * SECTIONS + 2, 1, 0.0))
    assert before == steps_of(3)[: STEPS + 1]
    finished, told = run(work)
    assert isinstance(finished, Finished)
    assert told[0] == Resumed(STEPS + 1, (0, 0, STEPS + 1))
    assert told_steps(told) == [*steps_of(1, 2), *steps_of(3)[STEPS + 1 :]]
    assert made(work) == expected
    assert finished.timings["sample"] > 0


def test_a_helper_that_dies_after_any_message_costs_one_step_and_the_video_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = chain_in(tmp_path / "alone")
    run(alone)
    _, told = run(helper(chain_in(tmp_path / "whole")))
    points = [number for number, each in enumerate(told) if isinstance(each, StepDone | SectionDecoded)]
    for number in points[: len(points) // 2 + 1]:  # in its first clip, and at the begin of the next one
        work, ears = chain_in(tmp_path / str(number)), Ears()
        monkeypatch.setattr(ears, "theirs", Cut(ears.theirs, number))
        with pytest.raises(PowerCut):
            Generation(helper(work), ENGINES, ears.theirs).run()
        finished, told = run(work)
        assert isinstance(finished, Finished)
        assert made(work) == made(alone), f"interrupted at message {number}"
        steps = told_steps(ears.heard()) + told_steps(told)
        assert len(steps) - len(set(steps)) <= 1


class Slow(Ears):
    """A helper that is in the midst of its clip until it may go on."""

    def __init__(self, work: Work, when: tuple[int, int]) -> None:
        super().__init__()
        self.waits, self.goes_on = threading.Event(), threading.Event()
        send = self.theirs.send

        def sending(message: Any) -> None:
            send(message)
            if isinstance(message, StepDone) and (message.section, message.step) == when:
                self.waits.set()
                assert self.goes_on.wait(60)

        self.theirs.send = sending  # type: ignore[method-assign] # the same, and a wait
        self.ended: list[Message] = []
        self._thread = threading.Thread(target=lambda: self.ended.append(answer(work, ENGINES, self.theirs)))

    def __enter__(self) -> "Slow":
        self._thread.start()
        assert self.waits.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self.goes_on.set()
        self._thread.join(60)
        assert not self._thread.is_alive()


class Heard(Ears):
    """The ears of the worker of the job; what it says can be awaited."""

    def until(self, kind: type[Message]) -> list[Message]:
        told: list[Message] = []
        while not told or not isinstance(told[-1], kind):
            assert self.ours.poll(60)
            told.append(self.ours.recv())
        return told


@pytest.fixture
def beside(work: Work, quick: None) -> Iterator[tuple[Slow, Heard, list[Message]]]:
    """Have a helper in the midst of the last clip, and the worker of the job at the end of the others."""
    ears, ended = Heard(), []
    with Slow(helper(work), (2 * SECTIONS + 1, STEPS)) as slow:
        job = threading.Thread(target=lambda: ended.append(answer(work, ENGINES, ears.theirs)))
        job.start()
        yield slow, ears, ended
        slow.goes_on.set()
        job.join(60)
        assert not job.is_alive()


def test_the_worker_of_the_job_waits_for_the_last_clip_of_another_and_gives_signs_of_life(
    work: Work, beside: tuple[Slow, Heard, list[Message]], expected: dict[str, bytes]
) -> None:
    slow, ears, ended = beside
    told = ears.until(WaitsForClip)
    told += ears.until(WaitsForClip)
    assert told_steps(told) == steps_of(1, 2)
    assert not ended
    slow.goes_on.set()
    while not ended:
        told += ears.heard()
    assert isinstance(ended[0], Finished)
    assert slow.ended == [Helped()]
    assert told_steps(told) == steps_of(1, 2), "the last clip is the helper's"
    assert made(work) == expected


def test_the_worker_of_the_job_ends_the_clip_that_another_has_left(
    work: Work, beside: tuple[Slow, Heard, list[Message]], expected: dict[str, bytes]
) -> None:
    slow, ears, ended = beside
    told = ears.until(WaitsForClip)
    slow.ours.send(Leave())
    slow.goes_on.set()
    while not ended:
        told += ears.heard()
    assert isinstance(ended[0], Finished)
    assert slow.ended == [Stopped()]
    assert told_steps(told) == [*steps_of(1, 2), *steps_of(3)[STEPS:]]
    assert made(work) == expected


def test_who_waits_for_another_can_leave(work: Work, beside: tuple[Slow, Heard, list[Message]]) -> None:
    slow, ears, ended = beside
    ears.until(WaitsForClip)
    ears.ours.send(Leave())
    while not ended:
        ears.heard()
    assert ended == [Stopped()]
    assert not slow.ended


def test_what_is_kept_of_a_cancelled_chain_ends_at_its_first_gap(work: Work) -> None:
    """A clip that another worker made behind the gap is not part of the video, nor are its files."""
    left_at(work, SectionDecoded(SECTIONS + 1, 0.0))  # the last clip is whole, the second has a section
    ears = LeavingEars(lambda told: isinstance(told, SectionDecoded) and told.section == SECTIONS)
    send = ears.ours.send
    ears.ours.send = lambda _: send(Leave(keep=True))  # type: ignore[method-assign] # another way to leave
    assert isinstance(answer(work, ENGINES, ears.theirs), Finished)
    names = made(work)
    assert ".clip-3.latents.safetensors" not in names
    stills = [name for name in names if name.startswith(".section-")]
    assert stills == [f".section-{number}.png" for number in range(SECTIONS + 1)]


def test_a_helper_sets_nothing_aside(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is unusable for it may be usable for the worker of the job."""
    left_at(work, StepDone(2 * SECTIONS + 1, 1, 0.0))
    before = {path: path.read_bytes() for path in work.checkpoint.rglob("*") if path.is_file()}
    monkeypatch.setattr(identity, "versions", lambda: {"torch": "0"})
    ended, told = run(helper(work))
    assert isinstance(ended, Failed)
    assert not ended.retry
    assert told == []
    assert before == {path: path.read_bytes() for path in work.checkpoint.rglob("*") if path.is_file()}


@pytest.mark.parametrize("moves", [0.0, 3.0])
def test_measures_of_parts_add_up_to_those_of_the_whole(moves: float) -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 200, (160, 160, 3)).astype(np.float64)
    frames = np.stack([picture + moves * number for number in range(6)]).astype(np.uint8)
    frames[4] = 7
    whole, parts = Measures(), Measures()
    whole.add(frames)
    for part in (frames[:1], frames[1:1], frames[1:4], frames[4:]):
        other = Measures()
        other.add(part, finite=len(part) != 3)
        parts += other
    assert parts.not_finite == 3
    parts.not_finite = 0
    assert parts.to_json() == whole.to_json()


def test_a_helper_that_is_told_to_leave_before_it_begins_does_no_step(work: Work) -> None:
    ears = Ears()
    ears.ours.send(Leave())
    assert isinstance(answer(helper(work), ENGINES, ears.theirs), Stopped)
    assert told_steps(ears.heard()) == []


def test_who_is_told_to_leave_while_the_model_is_loaded_does_no_step(work: Work) -> None:
    ears = Ears()
    send = ears.theirs.send

    def sending(message: Any) -> None:
        send(message)
        if isinstance(message, Ready):
            ears.ours.send(Leave())

    ears.theirs.send = sending  # type: ignore[method-assign] # the same, and an answer
    assert isinstance(answer(helper(work), ENGINES, ears.theirs), Stopped)
    assert told_steps(ears.heard()) == []


def test_no_other_worker_enters_the_last_clip_before_its_last_section_is_saved(
    work: Work, expected: dict[str, bytes]
) -> None:
    ears = Ears()
    sampled = Generation(work, ENGINES, ears.theirs)
    assert sampled.run(write=False) == Sampled()
    assert run(helper(work)) == (Helped(), [])
    assert isinstance(sampled.write(), Finished)
    assert made(work) == expected
