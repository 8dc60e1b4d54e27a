"""The daemon's loop, round by round, with a worker that says what the test wants."""

import multiprocessing
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import event

from framepack_core.models import BUILT_IN, ModelSpec, Source
from framepackd import control, daemon, database, deliveries, worker
from framepackd.config import GpuConfig
from framepackd.daemon import Daemon
from framepackd.database import State, StoreError
from framepackd.folders import MARKER
from framepackd.jobs import JobStore
from tests.daemon.test_files import Place

LARGE = {"versions": "x" * 100_000}  # does not fit into the pages that the database has


class Loop:
    """A daemon on a place of its own, whose worker is the other end of a pipe."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, *, once: bool = False) -> None:
        self.place = Place(root)
        self.ours, self.worker = multiprocessing.Pipe()
        self.started = 0
        monkeypatch.setattr(worker, "start", self._start)
        for module in (daemon, deliveries):  # what is done apart is done within a round
            monkeypatch.setattr(module, "PATIENCE_SECONDS", 60.0)
        config = self.place.config
        self.daemon = Daemon(config, self.place.store, once=once, load_again=lambda: config)

    def _start(self) -> worker.Handle:
        self.started += 1
        process: Any = SimpleNamespace(
            is_alive=lambda: True, join=lambda *_: None, kill=lambda: None, sentinel=self.ours
        )
        return worker.Handle(process, self.ours)

    def round(self) -> None:
        """Go round, however short ago the last time was."""
        self.daemon._next_scan = self.daemon._store_again = self.daemon._look_again = 0.0
        self.daemon._deliveries.retry_now()
        self.daemon._round()

    def start_job(self) -> None:
        self.place.drop()
        self.round()
        assert isinstance(self.worker.recv(), worker.Work)

    def paused(self) -> str | None:
        words: str | None = self.daemon._describe()["paused"]
        return words

    def counts(self) -> dict[str, int]:
        return {state: count for state, count in self.place.store.counts().items() if count}


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loop:
    return Loop(tmp_path / "place", monkeypatch)


class FullDisk:
    """Has SQLite find no room for another page."""

    def __init__(self, store: JobStore) -> None:
        self.full = False
        event.listen(store._engine, "connect", self._limit)

    def _limit(self, connection: sqlite3.Connection, _: object) -> None:
        if self.full:
            connection.execute("PRAGMA max_page_count = 1")  # as many as there are


@pytest.fixture
def disk(loop: Loop) -> FullDisk:
    return FullDisk(loop.place.store)


def test_what_the_worker_said_while_the_disk_was_full_is_recorded_when_there_is_room(
    loop: Loop, disk: FullDisk
) -> None:
    loop.start_job()
    disk.full = True
    loop.worker.send(worker.Finished({}, LARGE, {}, None))
    for _ in range(2):
        loop.round()
        assert "full" in str(loop.paused())
        assert loop.counts() == {"running": 1}
    disk.full = False
    loop.round()
    assert loop.paused() is None
    assert loop.counts() == {"done": 1}


def test_files_taken_in_while_the_disk_was_full_become_a_job_when_there_is_room(
    loop: Loop, disk: FullDisk
) -> None:
    loop.place.drop()
    (loop.place.config.inbox / "cat.txt").write_text("a long story " * 1_200)
    disk.full = True
    loop.round()
    assert loop.counts() == {}
    assert not list(loop.place.config.inbox.iterdir()), "they had been moved when it showed"
    disk.full = False
    loop.round()
    assert loop.counts() == {"running": 1}


@pytest.mark.parametrize(
    "says",
    [worker.StepDone(1, 1, 1.0), worker.Finished({}, {}, {}, None), worker.Failed("no", retry=True), None],
)
def test_a_lock_of_another_program_is_waited_for(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, says: worker.Message | None
) -> None:
    """Also where the worker has died, and its attempt is to be counted."""
    loop.start_job()
    monkeypatch.setattr(database, "BUSY_MILLISECONDS", 10)
    if says is None:
        running = loop.daemon._runner._worker
        assert running is not None
        dead: Any = SimpleNamespace(is_alive=lambda: False, exitcode=-9, join=lambda: None)
        running.process = dead
    else:
        loop.worker.send(says)
    with closing(sqlite3.connect(loop.place.config.database)) as other:
        other.execute("BEGIN IMMEDIATE")
        for _ in range(2):
            loop.round()
        assert "another program holds it" in str(loop.paused())
        assert loop.counts() == {"running": 1}
    loop.round()
    (job,) = (loop.place.store.get(job_id) for job_id in loop.place.store.states())
    expected = {worker.StepDone: (1, 0), worker.Finished: (0, 0), worker.Failed: (0, 1), type(None): (0, 1)}
    assert (job.steps_run, job.attempts) == expected[type(says)], "counted once"


def test_a_job_that_could_not_be_claimed_stays_in_the_queue(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.place.drop()
    loop.place.take()
    monkeypatch.setattr(database, "BUSY_MILLISECONDS", 10)
    with closing(sqlite3.connect(loop.place.config.database)) as other:
        other.execute("BEGIN IMMEDIATE")
        loop.round()
    assert loop.counts() == {"queued": 1}
    loop.round()
    assert loop.counts() == {"running": 1}
    assert loop.started == 1


def test_a_database_that_is_damaged_meanwhile_ends_the_daemon_with_what_to_do(loop: Loop) -> None:
    loop.start_job()
    loop.place.config.database.write_bytes(b"garbage" * 10_000)
    loop.worker.send(worker.StepDone(1, 1, 1.0))
    with pytest.raises(StoreError, match="put a backup in its place"):
        loop.round()


def test_told_to_stop_while_the_database_cannot_be_used_it_ends_and_says_so(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.start_job()
    monkeypatch.setattr(database, "BUSY_MILLISECONDS", 10)
    with closing(sqlite3.connect(loop.place.config.database)) as other:
        other.execute("BEGIN IMMEDIATE")
        loop.worker.send(worker.StepDone(1, 1, 1.0))
        loop.round()
        loop.daemon.stop()
        with pytest.raises(StoreError, match="another program holds it"):
            loop.round()
    assert [job.name for job in loop.place.store.recover()] == ["cat"], "for the next daemon"


@pytest.mark.parametrize("once", [False, True], ids=["", "once"])
def test_a_queue_whose_model_is_missing_waits_and_goes_on_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, once: bool
) -> None:
    """With --once nobody waits: the worker is asked, and its refusal fails the job."""
    loop = Loop(tmp_path / "place", monkeypatch, once=once)
    here, gone = tmp_path / "here", tmp_path / "gone"
    shutil.copytree(BUILT_IN["demo"].transformer.folder, here)
    config = loop.place.config.model_copy(
        update={
            "models": {
                "demo": SimpleNamespace(spec=lambda _: spec(here)),
            }
        }
    )
    loop.daemon._config = loop.daemon._runner._config = config
    here.rename(gone)
    loop.place.drop()
    loop.round()
    assert loop.started == int(once)
    if once:
        return
    assert f"{here / 'config.json'} is missing" in str(loop.paused())
    assert loop.counts() == {"queued": 1}
    gone.rename(here)
    loop.round()
    assert loop.paused() is None
    assert loop.counts() == {"running": 1}


def spec(transformer: Path) -> ModelSpec:
    return replace(BUILT_IN["demo"], transformer=Source(str(transformer)))


def test_a_pause_stops_the_running_job_and_lets_the_worker_go(loop: Loop) -> None:
    loop.start_job()
    asked = ask_in_thread(loop, {"command": "pause"})
    loop.round()
    assert asked()["results"][0]["done"]
    assert "framepackd resume goes on" in str(loop.paused())
    assert loop.worker.recv() == worker.Leave(), "at its next step"
    loop.worker.send(worker.Stopped())
    loop.round()
    assert loop.counts() == {"queued": 1}
    assert loop.daemon._runner._worker is None, "the memory of the GPU is free"
    (job,) = loop.place.store.in_state(State.QUEUED)
    assert (job.attempts, job.history[-1]["note"]) == (0, "paused")
    loop.place.drop()
    loop.round()
    assert loop.counts() == {"queued": 2}, "files are taken in all the same"


def test_a_queue_that_waits_for_a_model_and_is_paused_sleeps(loop: Loop) -> None:
    loop.daemon._obstacles = (lambda *_: "nothing is there",)
    loop.place.drop()
    loop.round()
    assert loop.paused() == "nothing is there"
    loop.place.store.pause()
    loop.daemon._take_up_leftovers()
    loop.daemon._round()
    loop.daemon._look_again = 0.0  # long ago
    loop.daemon._wait()  # it was woken by what was done apart
    loop.daemon._next_scan, loop.daemon._changed = time.monotonic() + 0.2, False
    began = time.monotonic()
    loop.daemon._wait()
    assert time.monotonic() - began > 0.1


def test_a_running_job_is_cancelled_at_its_next_step(loop: Loop) -> None:
    loop.start_job()
    asked = ask_in_thread(loop, {"command": "cancel", "jobs": ["cat"], "keep": True})
    loop.round()
    assert "stops at its next step" in asked()["results"][0]["message"]
    assert loop.place.store.in_state(State.RUNNING)[0].cancel == "keep", "recorded before all else"
    assert loop.worker.recv() == worker.Leave(keep=True)
    (job,) = loop.place.store.in_state(State.RUNNING)
    result = loop.place.config.jobs_dir / job.id / "result"
    result.mkdir()
    (result / ".mp4").write_text("the first sections")
    loop.worker.send(worker.Finished({}, {}, {}, None))
    loop.round()
    assert loop.counts() == {"cancelled": 1}
    delivered = sorted(path.name for path in loop.place.config.failed.iterdir())
    assert delivered == [MARKER, "cat.cancelled.txt", "cat.mp4", "cat.png", "cat.txt"]


@pytest.mark.parametrize("ends", ["the daemon stops", "nothing exists", "the worker dies"])
def test_what_exists_is_written_by_a_run_of_its_own_if_it_could_not_be_at_once(loop: Loop, ends: str) -> None:
    loop.start_job()
    (job,) = loop.place.store.in_state(State.RUNNING)
    (loop.place.config.jobs_dir / job.id / "checkpoint").mkdir()
    loop.daemon._paused = "by somebody"  # the worker is told to leave before the wish to keep arrives
    loop.round()
    assert loop.worker.recv() == worker.Leave()
    asked = ask_in_thread(loop, {"command": "cancel", "jobs": ["cat"], "keep": True})
    loop.round()
    assert asked()["results"][0]["done"]
    loop.worker.send(worker.Stopped())
    loop.round()
    (work,) = (message for message in messages(loop) if isinstance(message, worker.Work))
    assert work.keep_only, "it generates no more"
    if ends == "the worker dies":
        for _ in range(loop.place.config.max_attempts):
            assert loop.counts() == {"running": 1}
            loop.worker.send(worker.Failed("no", retry=True))
            loop.round()
    elif ends == "nothing exists":
        loop.worker.send(worker.Stopped())
    else:
        loop.daemon.stop()
        loop.worker.send(worker.Finished({}, {}, {}, None))
    loop.round()
    assert loop.counts() == {"cancelled": 1}


def messages(loop: Loop) -> Iterator[object]:
    while loop.worker.poll():
        yield loop.worker.recv()


def test_a_disk_that_fails_under_a_job_is_given_time(loop: Loop) -> None:
    loop.start_job()
    loop.worker.send(worker.Blocked("/jobs: No space left on device"))
    loop.round()
    assert loop.paused() == "/jobs: No space left on device"
    assert loop.counts() == {"queued": 1}
    loop.round()
    assert loop.paused() is None
    assert loop.counts() == {"running": 1}


def test_which_rung_of_the_memory_ladder_worked_is_remembered_for_the_next_job(loop: Loop) -> None:
    loop.start_job()
    loop.worker.send(worker.Lowered("cpu|demo|128x128", 2, "smaller tiles"))
    loop.worker.send(worker.Finished({}, {}, {}, None))
    loop.round()
    loop.place.drop()
    loop.round()
    (work,) = messages(loop)
    assert isinstance(work, worker.Work)
    assert work.rungs == {"cpu|demo|128x128": 2}


def test_what_is_set_of_the_gpu_reaches_the_worker(loop: Loop) -> None:
    gpu = GpuConfig(vae_tiling=True, attention="_native_math", compile=False)
    loop.daemon._runner._config = loop.place.config.model_copy(update={"gpu": gpu})
    loop.place.drop()
    (loop.place.config.inbox / "cat.toml").write_text("gpu_memory_preservation = 6\n")
    loop.round()
    (work,) = messages(loop)
    assert isinstance(work, worker.Work)
    assert (work.vae_tiling, work.attention, work.compile) == (True, "_native_math", False)
    assert work.keep_free == 6 * 2**30


def test_a_job_that_ends_in_the_moment_it_is_cancelled_is_cancelled(loop: Loop) -> None:
    loop.start_job()
    asked = ask_in_thread(loop, {"command": "cancel", "jobs": ["cat"]})
    loop.round()
    asked()
    loop.worker.send(worker.Finished({}, {}, {}, None))
    loop.round()
    assert loop.counts() == {"cancelled": 1}


def test_nobody_is_answered_for_what_is_done_later(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that the loop does not come to in time is withdrawn, not done behind the back."""
    monkeypatch.setattr("framepackd.daemon.REQUEST_SECONDS", 0.01)
    assert "nothing was changed" in loop.daemon.answer({"command": "pause"})["error"]
    loop.round()
    assert loop.paused() is None


def ask_in_thread(loop: Loop, request: dict[str, Any]) -> Any:
    """Ask as another process does, and give the answer when the loop has gone round."""
    answers: list[Any] = []

    def ask() -> None:
        with control.serve(loop.place.config.state_dir, loop.daemon.answer):
            answers.append(control.ask(loop.place.config.state_dir, request))

    thread = threading.Thread(target=ask)
    thread.start()
    deadline = time.monotonic() + 10
    while loop.daemon._requests.empty() and time.monotonic() < deadline:
        time.sleep(0.005)

    def answer() -> Any:
        thread.join(10)
        return answers[0]

    return answer
