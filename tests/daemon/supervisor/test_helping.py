"""A device that the queue does not need makes clips of a chain that another one computes."""

import multiprocessing
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from framepackd.control import commands
from framepackd.jobs.folder import CHECKPOINT, INPUTS
from framepackd.jobs.job import Job, State
from framepackd.supervisor import process
from framepackd.worker.messages import (
    Again,
    Failed,
    Finished,
    Helped,
    Leave,
    Ready,
    Resumed,
    Sampled,
    SectionDecoded,
    StepDone,
    Stopped,
    WaitsForClip,
    Work,
    Written,
)
from tests.daemon.loop import Loop, got

CLIPS = 4
DONE = Finished({}, {}, {}, None)


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loop:
    """Two devices, and a chain that the first one has begun."""
    loop = Loop(tmp_path / "place", monkeypatch, devices=("cpu", "cpu"))
    drop_chain(loop)
    loop.round()
    loop.worker.send(Resumed(0, (0,) * CLIPS))
    loop.worker.send(Ready("cpu", "a CPU", "cpu"))
    return loop


def drop_chain(loop: Loop) -> None:
    inbox = loop.place.config.inbox
    for number in range(CLIPS + 1):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(inbox / f"lake_frame_{number}.png")
    (inbox / "lake.txt").write_text("a lake")
    loop.place.take()


def begin(loop: Loop) -> Any:
    """Have the first device do a step, and give the other's end of its worker."""
    loop.worker.send(StepDone(1, 1, 2.0))
    loop.round()
    (other,) = loop.others
    return other


def chain(loop: Loop) -> Job:
    (job,) = loop.place.store.matching("lake")
    return job


def received(worker: Any) -> list[Any]:
    found = []
    while worker.poll():
        found.append(worker.recv())
    return found


def drop(loop: Loop, folder: str) -> None:
    loop.place.drop(folder)
    loop.place.take()


def test_it_helps_once_the_job_has_done_a_step(loop: Loop) -> None:
    loop.round()
    assert loop.others == [], "it may yet turn out that the job cannot run"
    (work,) = received(begin(loop))
    assert isinstance(work, Work)
    assert (work.job_id, work.helps) == (chain(loop).id, True)
    (own, *_) = received(loop.worker)
    assert own.helps is False


@pytest.mark.parametrize("left", [1, 2])
def test_it_helps_only_where_another_clip_is_left_begun_or_not(loop: Loop, left: int) -> None:
    per_clip = chain(loop).steps_total // CLIPS
    clips = (1,) * left + (per_clip,) * (CLIPS - left)
    loop.worker.send(Resumed(sum(clips), clips))
    loop.worker.send(StepDone(1, 2, 2.0))
    loop.round()
    assert len(loop.others) == left - 1


def test_it_helps_again_once_the_job_is_started_again(loop: Loop) -> None:
    other = begin(loop)
    other.send(Helped())
    loop.round()
    received(other)
    loop.answer_and_leave(Again("for a test"))
    loop.worker.send(Resumed(1, (1, 0, 0, 0)))
    loop.worker.send(StepDone(1, 2, 2.0))
    loop.round()
    (work,) = received(other)
    assert (work.job_id, work.helps) == (chain(loop).id, True)


def test_it_does_not_help_with_a_job_of_one_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(tmp_path / "place", monkeypatch, devices=("cpu", "cpu"))
    drop(loop, "a")
    loop.round()
    loop.worker.send(StepDone(1, 1, 2.0))
    loop.round()
    assert loop.others == []


def test_a_card_of_another_kind_does_not_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bits would be others."""
    loop = Loop(tmp_path / "place", monkeypatch, devices=("cuda:0", "cuda:1"))
    for supervisor, card in zip(loop.daemon.cards.each, ("RTX 3060", "RTX 4090"), strict=True):
        loop.daemon.cards.passed_over.device_found(supervisor, card)
    drop_chain(loop)
    loop.round()
    loop.worker.send(Resumed(0, (0,) * CLIPS))
    loop.worker.send(StepDone(1, 1, 2.0))
    loop.round()
    assert loop.others == []
    loop.daemon.cards.passed_over.device_found(loop.daemon.cards.each[1], "RTX 3060")
    loop.round()
    assert len(loop.others) == 1


def test_a_job_of_the_queue_goes_first(loop: Loop) -> None:
    other = begin(loop)
    drop(loop, "a")
    loop.round()
    assert [type(message) for message in received(other)] == [Work, Leave]
    loop.round()
    assert received(other) == [], "it is told once"
    other.send(Stopped())
    loop.round()
    assert got(loop, other) == ["a"]
    other.send(DONE)
    loop.round()
    (work,) = received(other)
    assert (work.job_id, work.helps) == (chain(loop).id, True)


def test_the_steps_of_both_are_counted(loop: Loop) -> None:
    other = begin(loop)
    job = chain(loop)
    first = job.sections - job.sections // CLIPS + 1  # section of the clip at the end
    other.send(Ready("cpu", "a CPU", "cpu"))
    for step in (1, 2):
        other.send(StepDone(first, step, 2.0))
    other.send(SectionDecoded(first, 1.0))
    loop.worker.send(StepDone(1, 2, 2.0))
    loop.round()
    job = chain(loop)
    assert (job.section, job.step, job.steps_beyond) == (1, 2, 2), "the place is that of its own worker"
    assert job.steps_run == 4
    assert _report(loop)["progress"] == pytest.approx(4 / job.steps_total, rel=0.6)


def test_a_chain_of_which_another_made_a_clip_resumes_with_all_that_is_done(loop: Loop) -> None:
    per_clip = chain(loop).steps_total // CLIPS
    loop.worker.send(Resumed(per_clip + 3 + 2, (per_clip, 3, 0, 2)))
    loop.round()
    job = chain(loop)
    assert (job.section - 1) * job.steps + job.step == per_clip + 3
    assert (job.steps_beyond, job.steps_run) == (2, per_clip + 5)
    loop.worker.send(Resumed(per_clip + 3 + 2, (per_clip, 3, 0, 2)))
    loop.round()
    assert chain(loop).steps_run == per_clip + 5, "no step is counted twice"


def test_a_clip_that_another_makes_before_the_place_is_not_counted_as_done(loop: Loop) -> None:
    begin(loop)
    job = chain(loop)
    loop.worker.send(StepDone(job.sections // CLIPS * 2 + 1, 1, 2.0))  # it went on in the third clip
    loop.round()
    job = chain(loop)
    assert (job.section - 1) * job.steps + job.step + job.steps_beyond == 2


def test_the_status_names_both_devices_and_the_end_is_sooner(loop: Loop) -> None:
    alone = _report(loop)
    other = begin(loop)
    report = _report(loop)
    assert report["device"] == "cpu, cpu"
    assert report["stage"] == ["clip 1/4 and another", "section 1/4", "step 1/25"]
    assert alone["device"] == "cpu"
    first, second = loop.daemon.snapshot()["daemon"]["devices"]
    assert (first["job"], second["job"], second["helps"]) == (chain(loop).id, None, chain(loop).id)
    loop.worker.send(SectionDecoded(1, 4.0))
    loop.round()
    both = _report(loop)["eta_seconds"]
    other.send(Helped())
    loop.round()
    assert _report(loop)["eta_seconds"] == pytest.approx(2 * both, rel=0.01)


def _report(loop: Loop) -> Any:
    (report,) = (job for job in loop.daemon.snapshot()["jobs"] if job["name"] == "lake")
    return report


@pytest.mark.parametrize("answer", [Helped(), Failed("boom", retry=False), Failed("boom", retry=True)])
def test_however_it_ends_the_job_loses_nothing_and_it_does_not_help_again(loop: Loop, answer: Any) -> None:
    other = begin(loop)
    other.send(answer)
    loop.round()
    loop.round()
    assert len(loop.others) == 1
    assert not any(isinstance(message, Leave) for message in received(loop.worker))
    assert (chain(loop).state, chain(loop).attempts) == (State.RUNNING, 0)


def die(loop: Loop, number: int) -> None:
    """Have the worker of a device die."""
    running = loop.daemon.cards.each[number].worker
    assert running is not None
    dead: Any = SimpleNamespace(
        is_alive=lambda: False, join=lambda *_: None, kill=lambda: None, sentinel=loop.alive, exitcode=-9
    )
    running.process = dead
    (loop.worker, *loop.others)[number].close()
    if number == 0:
        loop.daemon.cards.each[0].listen()
        loop.ours, loop.worker = multiprocessing.Pipe()
    loop.round()


def test_its_death_costs_the_job_no_attempt(loop: Loop) -> None:
    begin(loop)
    die(loop, 1)
    assert (chain(loop).state, chain(loop).attempts) == (State.RUNNING, 0)
    assert len(loop.others) == 1


def test_only_it_is_ended_when_it_hangs(loop: Loop) -> None:
    begin(loop)
    owner, other = (supervisor.worker for supervisor in loop.daemon.cards.each)
    assert owner is not None
    assert other is not None
    other.quiet = 1e6
    loop.round()
    assert other.hung is not None
    assert owner.hung is None
    die(loop, 1)
    assert (chain(loop).state, chain(loop).attempts) == (State.RUNNING, 0)


def test_a_job_whose_worker_died_resumes_once_its_helper_has_left(loop: Loop) -> None:
    other = begin(loop)
    die(loop, 0)
    assert [type(message) for message in received(other)] == [Work, Leave]
    assert (chain(loop).state, chain(loop).attempts) == (State.QUEUED, 1)
    steps_before = chain(loop).steps_run
    other.send(StepDone(chain(loop).sections, 1, 2.0))
    loop.round()
    assert chain(loop).steps_run == steps_before, "it is counted when the job resumes"
    assert loop.worker.poll() is False
    other.send(Stopped())
    loop.round()
    (work,) = [*received(loop.worker), *received(other)]
    assert (work.job_id, work.helps) == (chain(loop).id, False)
    assert chain(loop).state == State.RUNNING


def test_who_waits_for_its_clip_does_not_hang(loop: Loop) -> None:
    begin(loop)
    owner = loop.supervisor.worker
    assert owner is not None
    owner.quiet = loop.place.config.hang_seconds * process.FIRST_FACTOR - 1
    loop.worker.send(WaitsForClip())
    loop.round()
    assert owner.quiet < 10


@pytest.mark.parametrize("how", ["cancel", "pause", "stop"])
def test_it_leaves_with_the_worker_of_the_job(loop: Loop, how: str) -> None:
    other = begin(loop)
    queue = commands.Queue(loop.place.config, loop.place.store, loop.daemon.cards, loop.daemon.deliveries)
    if how == "stop":
        loop.daemon.stop()
    else:
        commands.perform({"command": how, "jobs": ["lake"]}, queue)
        loop.daemon.paused = loop.place.store.paused()
    loop.round()
    assert isinstance(received(loop.worker)[-1], Leave)
    assert [type(message) for message in received(other)] == [Work, Leave]
    loop.worker.send(Stopped())
    loop.round()
    assert not loop.daemon.finished
    other.send(Stopped())
    loop.round()
    assert loop.daemon.cards.busy is False
    assert loop.daemon.finished is (how == "stop")
    assert chain(loop).attempts == 0


def test_an_idle_worker_that_helps_is_not_unloaded(loop: Loop) -> None:
    begin(loop)
    assert loop.daemon.cards.each[1].unload_at > time.monotonic() + 1e6


def test_the_video_is_written_while_it_makes_another_job(loop: Loop) -> None:
    other = begin(loop)
    drop(loop, "a")
    loop.worker.send(Sampled())
    loop.round()
    assert [type(message) for message in received(other)][-1] == Leave
    other.send(Stopped())
    loop.round()
    assert chain(loop).state == State.RUNNING
    assert "a" in [*got(loop, loop.worker), *got(loop, other)]


def test_other_jobs_start_while_it_still_loads_for_a_chain_that_is_made(loop: Loop) -> None:
    """To load a model takes minutes: the queue does not wait for that."""
    begin(loop)
    drop(loop, "a")
    loop.worker.send(Sampled())
    loop.worker.send(Written(DONE))
    loop.round()
    assert "a" in got(loop, loop.worker)


def test_the_files_of_a_job_are_moved_once_it_has_left_them(loop: Loop) -> None:
    other = begin(loop)
    job = chain(loop)
    inputs = loop.place.config.jobs_dir / job.id / INPUTS
    queue = commands.Queue(loop.place.config, loop.place.store, loop.daemon.cards, loop.daemon.deliveries)
    commands.perform({"command": "cancel", "jobs": ["lake"]}, queue)
    loop.round()
    loop.worker.send(Stopped())
    loop.round()
    assert (chain(loop).state, len(list(inputs.iterdir()))) == (State.RUNNING, CLIPS + 2)
    other.send(Stopped())
    loop.round()
    assert chain(loop).state == State.CANCELLED
    assert not inputs.parent.exists()


@pytest.mark.parametrize("command", [{"command": "cancel"}, {"command": "retry", "anew": True}])
def test_no_command_moves_the_files_of_a_job_that_it_has_not_left(
    loop: Loop, command: dict[str, Any]
) -> None:
    other = begin(loop)
    checkpoint = loop.place.config.jobs_dir / chain(loop).id / CHECKPOINT
    checkpoint.mkdir()
    queue = commands.Queue(loop.place.config, loop.place.store, loop.daemon.cards, loop.daemon.deliveries)
    commands.perform({"command": "pause"}, queue)
    loop.daemon.paused = loop.place.store.paused()
    loop.round()
    loop.worker.send(Stopped())
    loop.round()
    answer = commands.perform(command | {"jobs": ["lake"]}, queue)
    loop.round()
    assert checkpoint.exists()
    assert chain(loop).state == State.QUEUED
    other.send(Stopped())
    loop.round()
    assert chain(loop).state == (State.CANCELLED if command["command"] == "cancel" else State.QUEUED)
    assert "another device" in str(answer)
