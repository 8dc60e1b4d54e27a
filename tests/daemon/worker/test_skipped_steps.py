"""Steps that a step cache skips are not saved: they are done again sooner, and give the same bits."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from framepack_core.engine import Engine, Step
from framepackd.worker import generation
from framepackd.worker.checkpoint import Checkpoints
from framepackd.worker.engines import Engines
from framepackd.worker.generation import Generation
from framepackd.worker.main import answer
from framepackd.worker.messages import Finished, Leave, Message, Resumed, StepDone, Stopped, Work
from tests.daemon.worker.jobs import Cut, Ears, PowerCut, made, run, work_in

GUIDED = {"true_cfg_scale": 2.5, "negative_prompt": "blurry"}
MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "teacache": ("framepack-f1", {"cache": "teacache"}),
    "teacache-guided": ("framepack-i2v", {"cache": "teacache", **GUIDED}),
    "magcache": ("framepack-f1", {"cache": "magcache"}),
}
ENGINES = {mode: Engines() for mode in MODES}  # each tiny model is loaded once


def work_of(mode: str, folder: Path) -> Work:
    transformer, settings = MODES[mode]
    return work_in(folder, transformer, steps=8, **settings)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Note what steps are done."""
    done: list[Step] = []
    sample = Engine.sample

    def noting(self: Engine, *arguments: Any, **named: Any) -> Iterator[Any]:
        for event in sample(self, *arguments, **named):
            if isinstance(event, Step):
                done.append(event)
            yield event

    monkeypatch.setattr(Engine, "sample", noting)
    return done


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Note after what a checkpoint is written: sections that are sampled, and steps of the next."""
    done: list[tuple[int, int]] = []
    save = Checkpoints.save

    def noting(self: Checkpoints, progress: Any, notes: Any, segment: Any = None) -> None:
        save(self, progress, notes, segment)
        if segment is None:
            done.append((len(progress.sampled), progress.step))

    monkeypatch.setattr(Checkpoints, "save", noting)
    return done


@pytest.mark.parametrize("mode", MODES)
def test_a_checkpoint_is_written_after_each_step_that_is_computed_and_at_a_sections_end(
    tmp_path: Path, steps: list[Step], saved: list[tuple[int, int]], mode: str
) -> None:
    """It was written after each, and skipped steps waited for the disk."""
    assert isinstance(run(work_of(mode, tmp_path), ENGINES[mode])[0], Finished)
    ends = [(step.section + 1, 0) if step.step == 8 else (step.section, step.step) for step in steps]
    worth = [end for end, step in zip(ends, steps, strict=True) if step.computed or step.step == 8]
    assert saved == worth
    assert len(saved) < len(steps), "the cache is at work"


class Late(generation.BackgroundWriter):
    """Does a piece of work no sooner than it is waited for, and never once the power is cut."""

    dead = False

    def __init__(self) -> None:
        super().__init__()
        self._work: Callable[[], None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        self.wait()
        self._work = work

    def wait(self) -> None:
        work, self._work = self._work, None
        if work is not None and not Late.dead:
            work()


class Without(Cut):
    """A connection at whose n-th step the power goes, with all that is not durable."""

    def send(self, message: Message) -> None:
        if not isinstance(message, StepDone):
            self.connection.send(message)
            return
        if self.left == 0:
            Late.dead = True
        super().send(message)


@pytest.mark.parametrize(
    "mode", [pytest.param("teacache", marks=pytest.mark.long), "teacache-guided", "magcache"]
)
def test_after_a_kill_at_most_one_computed_step_is_done_again_and_the_bits_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[Step], mode: str
) -> None:
    whole = work_of(mode, tmp_path / "whole")
    run(whole, ENGINES[mode])
    repeated = []
    for number in range(2, 12):  # into the second section
        work, ears = work_of(mode, tmp_path / str(number)), Ears()
        with monkeypatch.context() as patched:
            patched.setattr(generation, "BackgroundWriter", Late)
            patched.setattr(Late, "dead", False)
            patched.setattr(ears, "theirs", Without(ears.theirs, number))
            steps.clear()
            with pytest.raises(PowerCut):
                Generation(work, ENGINES[mode], ears.theirs).run()
        before = {(step.section, step.step) for step in steps}
        steps.clear()
        answer, _ = run(work, ENGINES[mode])
        assert isinstance(answer, Finished)
        assert made(work) == made(whole), f"killed at step {number}"
        again = [step for step in steps if (step.section, step.step) in before]
        assert sum(step.computed for step in again) <= 1, f"killed at step {number}"
        repeated.append(len(again))
    assert max(repeated) > 1, "skipped ones too"


def test_skipped_steps_do_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With MagCache they were a fifth of an H100's time."""
    told = threading.Event()
    waited: list[bool] = []
    save = Checkpoints.save

    def slow(self: Checkpoints, progress: Any, notes: Any, segment: Any = None) -> None:
        if (len(progress.sampled), progress.step) == (0, 5):
            waited.append(told.wait(20))
        save(self, progress, notes, segment)

    class Telling(Cut):
        def send(self, message: Message) -> None:
            super().send(message)
            if isinstance(message, StepDone) and message.step == 7:  # 6 and 7 are skipped
                told.set()

    monkeypatch.setattr(Checkpoints, "save", slow)
    ears = Ears()
    work = work_of("magcache", tmp_path)
    telling: Any = Telling(ears.theirs, 999)
    assert isinstance(answer(work, ENGINES["magcache"], telling), Finished)
    assert waited == [True]


def test_a_job_that_is_left_at_a_skipped_step_resumes_right_there(tmp_path: Path) -> None:
    ears = Ears()

    class Leaving(Cut):
        def send(self, message: Message) -> None:
            super().send(message)
            if isinstance(message, StepDone) and message.step == 4:
                ears.ours.send(Leave())

    work = work_of("magcache", tmp_path)
    leaving: Any = Leaving(ears.theirs, 999)
    assert answer(work, ENGINES["magcache"], leaving) == Stopped()
    reply, messages = run(work, ENGINES["magcache"])
    assert isinstance(reply, Finished)
    assert messages[0] == Resumed(4)
