"""While a worker writes the video of a job, its device computes the next one, and neither is lost."""

import multiprocessing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from framepackd.control import commands
from framepackd.jobs.job import Job, State
from framepackd.supervisor.process import FIRST_FACTOR
from framepackd.worker.messages import (
    Blocked,
    Failed,
    Finished,
    Leave,
    Resumed,
    Sampled,
    StepDone,
    Stopped,
    Written,
)
from tests.daemon.loop import Loop, messages, started

DONE = Written(Finished({}, {}, {}, None))


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loop:
    """Have job a written and job b computed by the same worker; c is queued."""
    loop = Loop(tmp_path / "place", monkeypatch)
    for folder in "abc":
        loop.place.drop(folder)
        loop.place.take()
    loop.round()
    assert started(loop) == ["a"]
    loop.worker.send(Sampled())
    loop.round()
    assert started(loop) == ["b"], "at once, though nothing says yet that a is written"
    return loop


def job(loop: Loop, folder: str) -> Job:
    (found,) = loop.place.store.matching(f"{folder}/cat")
    return found


def states(loop: Loop) -> list[str]:
    return [job(loop, folder).state for folder in "abc"]


def write_video(loop: Loop, folder: str) -> None:
    result = loop.place.config.jobs_dir / job(loop, folder).id / "result"
    result.mkdir()
    (result / ".mp4").write_bytes(b"video")


def die(loop: Loop) -> None:
    """Have the worker die; the next one has other ends of another pipe."""
    running = loop.supervisor.worker
    assert running is not None
    dead: Any = SimpleNamespace(
        is_alive=lambda: False, join=lambda *_: None, kill=lambda: None, sentinel=loop.alive, exitcode=-9
    )
    running.process = dead
    loop.worker.close()
    loop.supervisor.listen()
    loop.ours, loop.worker = multiprocessing.Pipe()
    loop.round()


def test_each_of_the_two_jobs_ends_by_its_own_message(loop: Loop) -> None:
    write_video(loop, "a")
    loop.worker.send(StepDone(1, 1, 0.1))
    loop.worker.send(DONE)
    loop.round()
    assert states(loop) == [State.DONE, State.RUNNING, State.QUEUED]
    assert (job(loop, "a").step, job(loop, "b").step) == (0, 1)
    loop.worker.send(Failed("the picture is damaged", retry=False))
    loop.round()
    assert states(loop) == [State.DONE, State.FAILED, State.RUNNING]
    assert started(loop) == ["c"]


def test_the_status_names_both_jobs(loop: Loop) -> None:
    report = loop.daemon.snapshot()
    a, b = job(loop, "a").id, job(loop, "b").id
    (device,) = report["daemon"]["devices"]
    assert (device["job"], device["finishing"]) == (b, a)
    running = {each["id"]: each for each in report["jobs"] if each["state"] == State.RUNNING}
    assert running[a]["stage"] == ["finishing"]
    assert running[b]["stage"] == ["loading the model"]
    assert running[a]["device"] == running[b]["device"] == device["name"]


def test_a_video_that_cannot_be_written_costs_only_its_job_an_attempt(loop: Loop) -> None:
    loop.worker.send(Written(Failed("ValueError: no", retry=True)))
    loop.round()
    assert states(loop) == [State.QUEUED, State.RUNNING, State.QUEUED]
    assert [job(loop, folder).attempts for folder in "ab"] == [1, 0]
    assert not any(isinstance(message, Leave) for message in messages(loop)), "it goes on with the other"


def test_a_full_disk_puts_the_written_job_back_and_leaves_the_other(loop: Loop) -> None:
    loop.worker.send(Written(Blocked("the disk is full")))
    loop.round()
    assert states(loop) == [State.QUEUED, State.RUNNING, State.QUEUED]
    assert job(loop, "a").attempts == 0


def test_a_worker_that_dies_costs_neither_of_its_two_jobs_an_attempt(loop: Loop) -> None:
    die(loop)
    assert states(loop) == [State.RUNNING, State.QUEUED, State.QUEUED], "the older one goes on first"
    assert [job(loop, folder).attempts for folder in "ab"] == [0, 0]


def test_after_such_a_death_the_video_is_written_with_no_other_beside_it(loop: Loop) -> None:
    """If the worker dies again, the job that is to blame loses an attempt: it cannot go on for ever."""
    die(loop)
    assert started(loop) == ["a"]
    loop.worker.send(Resumed(0))
    loop.worker.send(Sampled())
    loop.round()
    assert started(loop) == []
    die(loop)
    assert [job(loop, folder).attempts for folder in "ab"] == [1, 0]
    assert started(loop) == ["a"]
    write_video(loop, "a")
    loop.worker.send(Sampled())
    loop.worker.send(DONE)
    loop.round()
    loop.round()
    assert states(loop) == [State.DONE, State.RUNNING, State.QUEUED]
    assert started(loop) == ["b"]


@pytest.mark.parametrize(("hangs", "attempts"), [("unwritten", [1, 0]), ("quiet", [0, 1])])
def test_of_two_jobs_only_the_one_that_hangs_loses_an_attempt(
    loop: Loop, hangs: str, attempts: list[int]
) -> None:
    running = loop.supervisor.worker
    assert running is not None
    setattr(running, hangs, loop.place.config.hang_seconds * FIRST_FACTOR + 1)
    loop.supervisor.listen()
    assert running.hung is not None
    die(loop)
    assert [job(loop, folder).attempts for folder in "ab"] == attempts


def test_a_cancelled_job_that_is_only_written_does_not_touch_the_other(loop: Loop) -> None:
    queue = commands.Queue(loop.place.config, loop.place.store, loop.daemon.cards, loop.daemon.deliveries)
    commands.perform({"command": "cancel", "jobs": ["a/cat"]}, queue)
    loop.round()
    assert not any(isinstance(message, Leave) for message in messages(loop))
    write_video(loop, "a")
    loop.worker.send(DONE)
    loop.round()
    assert states(loop) == [State.CANCELLED, State.RUNNING, State.QUEUED]


def test_a_pause_and_a_stop_wait_for_the_video_that_is_written(loop: Loop) -> None:
    loop.place.store.pause()
    loop.daemon.paused = loop.place.store.paused()
    loop.round()
    assert list(messages(loop))[-1] == Leave(keep=False)
    loop.worker.send(Stopped())
    loop.round()
    assert states(loop) == [State.RUNNING, State.QUEUED, State.QUEUED]
    assert loop.supervisor.worker is not None, "the pause ends no worker that writes"
    loop.daemon.stop()
    assert not loop.daemon.finished
    write_video(loop, "a")
    loop.worker.send(DONE)
    loop.round()
    assert states(loop) == [State.DONE, State.QUEUED, State.QUEUED]


def test_a_job_that_begins_after_a_pause_can_be_left_again(loop: Loop) -> None:
    store = loop.place.store
    loop.worker.send(Stopped())
    store.pause()
    loop.daemon.paused = store.paused()
    loop.round()
    store.resume()
    loop.daemon.paused = None
    loop.round()
    assert started(loop) == ["b"]
    loop.daemon.stop()
    loop.round()
    assert list(messages(loop))[-1] == Leave(keep=False)


def test_a_daemon_that_dies_finds_both_jobs_again(loop: Loop) -> None:
    left = loop.place.store.recover()
    assert sorted(each.folder for each in left) == ["a", "b"]
    assert states(loop) == [State.QUEUED] * 3
    assert [job(loop, folder).attempts for folder in "ab"] == [0, 0]


def test_a_database_that_fails_meanwhile_forgets_neither_job(loop: Loop) -> None:
    assert loop.place.store.recover(loop.daemon.cards.running) == []
