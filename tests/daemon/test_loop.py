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
from sqlalchemy import Engine, event

from framepack_core.models.registry import BUILT_IN, ModelSpec, Source
from framepack_core.request import Cut
from framepackd.control import commands
from framepackd.delivery import deliveries
from framepackd.folders import MARKER
from framepackd.intake import take_back
from framepackd.jobs import database
from framepackd.jobs.database import StoreError
from framepackd.jobs.job import Job, State
from framepackd.settings.tables import GpuConfig
from framepackd.supervisor.supervisor import STOP_SECONDS
from framepackd.worker import messages as worker_messages
from tests.daemon.loop import Loop, ask_in_thread, messages, started

LARGE = {"versions": "x" * 100_000}  # does not fit into the pages that the database has


@pytest.fixture
def loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loop:
    return Loop(tmp_path / "place", monkeypatch)


class FullDisk:
    """Has SQLite find no room for another page."""

    def __init__(self) -> None:
        self.full = False

    def limit(self, connection: sqlite3.Connection, _: object) -> None:
        if self.full:
            connection.execute("PRAGMA max_page_count = 1")  # as many as there are


@pytest.fixture
def disk(loop: Loop) -> Iterator[FullDisk]:
    disk = FullDisk()
    event.listen(Engine, "connect", disk.limit)
    yield disk
    event.remove(Engine, "connect", disk.limit)


def test_what_the_worker_said_while_the_disk_was_full_is_recorded_when_there_is_room(
    loop: Loop, disk: FullDisk
) -> None:
    loop.start_job()
    disk.full = True
    loop.worker.send(worker_messages.Finished({}, LARGE, {}, None))
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
    [
        worker_messages.StepDone(1, 1, 1.0),
        worker_messages.Finished({}, {}, {}, None),
        worker_messages.Failed("no", retry=True),
        None,
    ],
)
def test_a_lock_of_another_program_is_waited_for(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, says: worker_messages.Message | None
) -> None:
    """Also where the worker has died, and its attempt is to be counted."""
    loop.start_job()
    monkeypatch.setattr(database, "BUSY_MILLISECONDS", 10)
    if says is None:
        running = loop.supervisor.worker
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
    expected = {
        worker_messages.StepDone: (1, 0),
        worker_messages.Finished: (0, 0),
        worker_messages.Failed: (0, 1),
        type(None): (0, 1),
    }
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
    loop.worker.send(worker_messages.StepDone(1, 1, 1.0))
    with pytest.raises(StoreError, match="put a backup in its place"):
        loop.round()


def test_told_to_stop_while_the_database_cannot_be_used_it_ends_and_says_so(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.start_job()
    monkeypatch.setattr(database, "BUSY_MILLISECONDS", 10)
    with closing(sqlite3.connect(loop.place.config.database)) as other:
        other.execute("BEGIN IMMEDIATE")
        loop.worker.send(worker_messages.StepDone(1, 1, 1.0))
        loop.round()
        loop.daemon.stop()
        with pytest.raises(StoreError, match="another program holds it"):
            loop.round()
    assert [job.name for job in loop.place.store.recover()] == ["cat"], "for the next daemon"


def test_a_queue_whose_model_does_not_fit_waits_and_starts_no_worker(loop: Loop, tmp_path: Path) -> None:
    """Each job failed before, after a worker was started, as if its files were to be fetched again."""
    file = tmp_path / "framepack-Q4_K_M.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    config = loop.place.config.model_copy(
        update={"models": {"demo": SimpleNamespace(spec=lambda _: spec(file))}}
    )
    loop.daemon.reconfigure(config)
    loop.place.drop()
    loop.round()
    assert not loop.started
    assert f"{file} is a GGUF file: " in str(loop.paused())
    assert loop.counts() == {"queued": 1}


@pytest.mark.parametrize("once", [False, True], ids=["", "once"])
def test_a_queue_whose_model_is_missing_waits_and_continues_by_itself(
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
    loop.daemon.reconfigure(config)
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
    assert loop.worker.recv() == worker_messages.Leave(), "at its next step"
    loop.worker.send(worker_messages.Stopped())
    loop.round()
    assert loop.counts() == {"queued": 1}
    assert loop.supervisor.worker is None, "the memory of the GPU is free"
    (job,) = loop.place.store.in_state(State.QUEUED)
    assert (job.attempts, job.history[-1]["note"]) == (0, "paused")
    loop.place.drop()
    loop.round()
    assert loop.counts() == {"queued": 2}, "files are taken in all the same"


def test_who_paused_the_queue_sees_it_paused(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page draws itself anew as soon as it has its answer."""
    seen: list[Any] = []
    paused = loop.daemon.store.paused

    def slowly() -> str | None:
        time.sleep(0.1)
        return paused()

    monkeypatch.setattr(loop.daemon.store, "paused", slowly)

    def pause_and_look() -> None:
        loop.daemon.answer({"command": "pause"})
        seen.append(loop.daemon.snapshot()["daemon"]["paused"])

    page = threading.Thread(target=pause_and_look)
    page.start()
    while loop.daemon.requests.empty():
        time.sleep(0.005)
    loop.round()
    page.join(10)
    assert str(seen[0]).startswith("by framepackd pause")


def test_a_queue_that_waits_for_a_model_and_is_paused_sleeps(loop: Loop) -> None:
    loop.starter.obstacles = (lambda *_: "nothing is there",)
    loop.place.drop()
    loop.round()
    assert loop.paused() == "nothing is there"
    loop.place.store.pause()
    loop.daemon.paused = loop.place.store.paused()
    loop.daemon.round()
    loop.starter.again = 0.0  # long ago
    loop.daemon.scanning.next_scan = time.monotonic() + 60
    assert loop.daemon.patience > 1


def test_a_running_job_is_cancelled_at_its_next_step(loop: Loop) -> None:
    loop.start_job()
    asked = ask_in_thread(loop, {"command": "cancel", "jobs": ["cat"], "keep": True})
    loop.round()
    assert "stops at its next step" in asked()["results"][0]["message"]
    assert loop.place.store.in_state(State.RUNNING)[0].cancel == "keep", "recorded before all else"
    assert loop.worker.recv() == worker_messages.Leave(keep=True)
    (job,) = loop.place.store.in_state(State.RUNNING)
    result = loop.place.config.jobs_dir / job.id / "result"
    result.mkdir()
    (result / ".mp4").write_text("the first sections")
    loop.worker.send(worker_messages.Finished({}, {}, {}, None))
    loop.round()
    assert loop.counts() == {"cancelled": 1}
    delivered = sorted(path.name for path in loop.place.config.failed.iterdir())
    assert delivered == [MARKER, "cat.cancelled.txt", "cat.mp4", "cat.png", "cat.txt"]


@pytest.mark.parametrize("ends", ["the daemon stops", "nothing exists", "the worker dies"])
def test_what_exists_is_written_by_a_run_of_its_own_if_it_could_not_be_at_once(loop: Loop, ends: str) -> None:
    loop.start_job()
    (job,) = loop.place.store.in_state(State.RUNNING)
    (loop.place.config.jobs_dir / job.id / "checkpoint").mkdir()
    loop.daemon.paused = "by somebody"  # the worker is told to leave before the wish to keep arrives
    loop.round()
    assert loop.worker.recv() == worker_messages.Leave()
    asked = ask_in_thread(loop, {"command": "cancel", "jobs": ["cat"], "keep": True})
    loop.round()
    assert asked()["results"][0]["done"]
    loop.worker.send(worker_messages.Stopped())
    loop.round()
    (work,) = (message for message in messages(loop) if isinstance(message, worker_messages.Work))
    assert work.keep_only, "it generates no more"
    if ends == "the worker dies":
        for _ in range(loop.place.config.max_attempts):
            assert loop.counts() == {"running": 1}
            loop.answer_and_leave(worker_messages.Failed("no", retry=True))
    elif ends == "nothing exists":
        loop.worker.send(worker_messages.Stopped())
    else:
        loop.daemon.stop()
        loop.worker.send(worker_messages.Finished({}, {}, {}, None))
    loop.round()
    assert loop.counts() == {"cancelled": 1}


def test_a_disk_that_fails_under_a_job_is_given_time(loop: Loop) -> None:
    loop.start_job()
    loop.worker.send(worker_messages.Blocked("/jobs: No space left on device"))
    loop.round()
    assert loop.paused() == "/jobs: No space left on device"
    assert loop.counts() == {"queued": 1}
    loop.round()
    assert loop.paused() is None
    assert loop.counts() == {"running": 1}


BROKEN = worker_messages.Failed(
    "AcceleratorError: CUDA error: unspecified launch failure", retry=True, device=True
)


def test_a_device_that_fails_in_two_fresh_workers_holds_the_queue_and_costs_no_job_an_attempt(
    loop: Loop,
) -> None:
    loop.start_job()
    loop.answer_and_leave(BROKEN)
    assert (loop.started, loop.paused(), loop.counts()) == (2, None, {"running": 1}), (
        "tried once more at once"
    )
    loop.answer_and_leave(BROKEN)
    assert "the device failed in 2 fresh workers in a row (AcceleratorError: CUDA" in str(loop.paused())
    assert (loop.started, loop.counts()) == (2, {"queued": 1})
    loop.round()  # when it is looked again
    assert loop.started == 3
    loop.answer_and_leave(BROKEN)
    assert "in 3 fresh workers" in str(loop.paused())
    loop.round()
    loop.worker.send(worker_messages.StepDone(1, 1, 1.0))
    loop.worker.send(worker_messages.Finished({}, {}, {}, None))
    loop.round()
    assert (loop.paused(), loop.counts()) == (None, {"done": 1})
    assert loop.place.store.in_state(State.DONE)[0].attempts == 0


def test_a_device_that_fails_when_it_has_computed_costs_the_job_an_attempt_in_a_new_worker(
    loop: Loop,
) -> None:
    loop.start_job()
    for attempt in range(1, loop.place.config.max_attempts + 1):
        assert loop.started == attempt
        loop.worker.send(worker_messages.StepDone(1, 1, 1.0))
        loop.answer_and_leave(BROKEN)
    assert loop.counts() == {"failed": 1}


def test_a_gpu_that_is_gone_holds_the_queue_with_the_reason_and_is_looked_for_again(loop: Loop) -> None:
    """After an update of the driver, or a suspend; until then the whole queue went to the failed folder."""
    loop.start_job()
    gone = worker_messages.Blocked("device 'cuda' is not there (0 CUDA devices are)", device=True)
    loop.answer_and_leave(gone)
    assert (loop.paused(), loop.counts()) == (gone.reason, {"queued": 1})
    loop.round()
    assert loop.started == 2, "CUDA looks for devices once a process"
    waits = []
    for _ in range(8):
        loop.answer_and_leave(gone)
        waits.append(loop.supervisor.faults.patience)
        loop.round()
    assert waits == [30, 60, 120, 240, 480, 480, 480, 480], "seconds: looking takes CPU time"
    loop.worker.send(worker_messages.StepDone(1, 1, 1.0))
    loop.worker.send(worker_messages.Finished({}, {}, {}, None))
    loop.round()
    assert (loop.paused(), loop.counts()) == (None, {"done": 1})
    assert loop.place.store.in_state(State.DONE)[0].attempts == 0


@pytest.mark.parametrize(
    ("model", "seen", "used", "expected"),
    [
        ("framepack", False, False, False),
        ("framepack", True, False, True),
        ("framepack", False, True, True),
        ("demo", True, True, False),
    ],
)
def test_auto_is_a_gpu_for_a_real_model_where_one_is_or_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, *, seen: bool, used: bool, expected: bool
) -> None:
    monkeypatch.setattr("framepackd.supervisor.readiness.gpu_seen", lambda: seen)
    monkeypatch.setattr("framepackd.daemon.missing_model", lambda *_: None)
    loop = Loop(tmp_path / "place", monkeypatch)
    if used:
        loop.start_job()
        loop.worker.send(
            worker_messages.Ready(
                "cuda:0", "NVIDIA GeForce RTX 3060, driver 550.54", "NVIDIA GeForce RTX 3060"
            )
        )
        loop.worker.send(worker_messages.Finished({}, {}, {}, None))
        loop.round()
        assert loop.daemon.snapshot()["daemon"]["hardware"] == "NVIDIA GeForce RTX 3060, driver 550.54"
        assert loop.place.store.gpu_used(), "by the next daemon, too"
    loop.place.drop()
    (loop.place.config.inbox / "cat.toml").write_text(f'model = "{model}"\nseed = 9\n')
    loop.round()
    (work,) = (message for message in messages(loop) if isinstance(message, worker_messages.Work))
    assert work.gpu_expected is expected


def test_a_worker_that_cannot_continue_is_followed_by_another_and_costs_nothing(loop: Loop) -> None:
    loop.start_job()
    loop.worker.send(worker_messages.Lowered("gpu|demo|128x128", 1, "smaller tiles"))
    loop.answer_and_leave(worker_messages.Again("out of memory (CUBLAS_STATUS_ALLOC_FAILED)"))
    assert (loop.started, loop.counts()) == (2, {"running": 1})
    (work,) = messages(loop)
    assert isinstance(work, worker_messages.Work)
    assert work.levels == {"gpu|demo|128x128": 1}
    (job,) = loop.place.store.in_state(State.RUNNING)
    assert job.attempts == 0
    assert any("out of memory (CUBLAS" in entry["note"] for entry in job.history)


def work_of_the_next_job(loop: Loop, said: worker_messages.Message) -> worker_messages.Work:
    """Have a worker say something of a job, and give what the next one is told."""
    loop.start_job()
    loop.worker.send(said)
    loop.worker.send(worker_messages.Finished({}, {}, {}, None))
    loop.round()
    loop.place.drop()
    loop.round()
    (work,) = messages(loop)
    assert isinstance(work, worker_messages.Work)
    return work


def test_which_memory_level_worked_is_remembered_for_the_next_job(loop: Loop) -> None:
    work = work_of_the_next_job(loop, worker_messages.Lowered("cpu|demo|128x128", 2, "smaller tiles"))
    assert work.levels == {"cpu|demo|128x128": 2}


def test_where_compiling_has_failed_the_next_worker_knows(loop: Loop) -> None:
    reason = "fatal error: Python.h"
    work = work_of_the_next_job(loop, worker_messages.Uncompiled("cpu|torch 2.13.0", reason))
    assert work.uncompiled == {"cpu|torch 2.13.0": reason}


def test_the_settings_of_the_gpu_reach_the_worker(loop: Loop) -> None:
    gpu = GpuConfig(vae_tiling=True, attention="_native_math", compile=False)
    loop.supervisor.config = loop.place.config.model_copy(update={"gpu": gpu})
    loop.place.drop()
    (loop.place.config.inbox / "cat.toml").write_text("gpu_memory_preservation = 6\n")
    loop.round()
    (work,) = messages(loop)
    assert isinstance(work, worker_messages.Work)
    assert (work.vae_tiling, work.attention, work.compile) == (True, "_native_math", False)
    assert work.keep_free == 6 * 2**30


def test_a_job_that_ends_in_the_moment_it_is_cancelled_is_cancelled(loop: Loop) -> None:
    loop.start_job()
    asked = ask_in_thread(loop, {"command": "cancel", "jobs": ["cat"]})
    loop.round()
    asked()
    loop.worker.send(worker_messages.Finished({}, {}, {}, None))
    loop.round()
    assert loop.counts() == {"cancelled": 1}


def test_a_request_that_is_answered_busy_is_not_done_later(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that the loop does not come to in time is withdrawn, not done behind the back."""
    monkeypatch.setattr("framepackd.control.requests.WAIT_SECONDS", 0.01)
    assert "nothing was changed" in loop.daemon.answer({"command": "pause"})["error"]
    loop.round()
    assert loop.paused() is None


def dies(loop: Loop, signal_number: int = 9) -> None:
    """Have the worker be gone, as the kernel tells it."""
    running = loop.supervisor.worker
    assert running is not None
    dead: Any = SimpleNamespace(
        is_alive=lambda: False, exitcode=-signal_number, join=lambda *_: None, kill=lambda: None
    )
    running.process = dead


def cancel(loop: Loop, *, keep: bool) -> None:
    """Cancel the running job, and have the worker told so."""
    asked = ask_in_thread(loop, {"command": "cancel", "jobs": ["cat"], "keep": keep})
    loop.round()
    assert asked()["results"][0]["done"]
    assert loop.worker.recv() == worker_messages.Leave(keep=keep)


def the_job(loop: Loop) -> Job:
    (job_id,) = loop.place.store.states()
    return loop.place.store.get(job_id)


@pytest.mark.parametrize("how", ["a second signal", "too slow"])
@pytest.mark.parametrize("cancelled", [None, "keep", "discard"])
def test_a_worker_that_is_ended_for_the_daemons_sake_costs_the_job_nothing(
    loop: Loop, caplog: pytest.LogCaptureFixture, how: str, cancelled: str | None
) -> None:
    """Least of all what was to be kept: it was told as a lack of memory, and an attempt counted."""
    loop.start_job()
    if cancelled is not None:
        cancel(loop, keep=cancelled == "keep")
    loop.daemon.stop()
    loop.round()
    if how == "a second signal":
        loop.daemon.stop()
    else:
        running = loop.supervisor.worker
        assert running is not None
        assert running.stop_sent is not None
        running.stop_sent -= STOP_SECONDS + 1
        loop.round()
    dies(loop)
    loop.round()
    job = the_job(loop)
    assert job.attempts == 0
    assert "memory" not in f"{job.error} {job.history} {caplog.text}"
    if cancelled == "discard":
        assert job.state == State.CANCELLED
        return
    assert (job.state, job.cancel, job.delivery) == (State.QUEUED, cancelled, None)
    assert job.history[-1]["note"] == "stopped with the daemon"
    loop.ours, loop.worker = multiprocessing.Pipe()  # the next daemon, with a worker of its own
    loop.daemon.stopping = False
    loop.round()
    (work,) = (message for message in messages(loop) if isinstance(message, worker_messages.Work))
    assert work.keep_only == (cancelled == "keep")


def test_a_worker_that_is_ended_at_once_has_not_hung(loop: Loop) -> None:
    loop.start_job()
    loop.daemon.stop()
    loop.daemon.stop()
    running = loop.supervisor.worker
    assert running is not None
    running.quiet = 1e9  # it takes its time to be gone
    loop.round()
    dies(loop)
    loop.round()
    assert (the_job(loop).state, the_job(loop).attempts) == (State.QUEUED, 0)


def test_an_idle_worker_that_is_ended_with_the_daemon_is_not_reported_as_a_lack_of_memory(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    loop.start_job()
    loop.worker.send(worker_messages.Failed("no", retry=False))
    loop.round()
    loop.daemon.stop()
    loop.daemon.stop()
    dies(loop)
    loop.round()
    assert "memory" not in caplog.text


@pytest.mark.parametrize("keep", [False, True])
def test_a_worker_that_dies_by_itself_costs_an_attempt_whatever_it_was_told(loop: Loop, keep: bool) -> None:
    loop.start_job()
    if keep:
        cancel(loop, keep=True)
    dies(loop)
    loop.round()
    assert the_job(loop).attempts == 1
    assert "memory" in str(the_job(loop).history)


def test_what_becomes_of_a_checkpoint_is_in_the_history_and_once_in_the_log(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    loop.start_job()
    told = "state-00000003 was made with another torch (1, now 2): beginning anew; kept in /jobs/aside-1"
    loop.worker.send(worker_messages.SetAside(told))
    loop.worker.send(worker_messages.Resumed(0))
    loop.round()
    job = the_job(loop)
    assert (job.state, job.attempts) == (State.RUNNING, 0)
    assert [entry["note"] for entry in job.history] == ["taken in", "started", told]
    assert caplog.text.count(told) == 1


def test_a_prompt_that_is_cut_is_reported_once_and_stands_where_the_job_does(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    loop.start_job()
    job = the_job(loop)
    llama = Cut(job.settings["prompt"], "llama", 300, 256, "then zoom in")
    told = "prompt is cut: the text encoder takes 256 of its 300 tokens, and what begins with 'then zoom in'"
    for cuts in ((llama,), (llama, replace(llama, encoder="clip", taken=75))):  # as of a second clip
        loop.worker.send(worker_messages.PromptsCut(cuts))
        loop.round()
    job = the_job(loop)
    assert job.state == State.RUNNING
    assert caplog.text.count("is cut") == caplog.text.count(told) == 1
    assert [record.levelname for record in caplog.records if "is cut" in record.message] == ["WARNING"]
    assert [warning.startswith(told) for warning in job.record()["warnings"]] == [True], "not for CLIP"
    entry = {"key": "prompt", "tokens": 300, "dropped": "then zoom in"}
    assert job.record()["cuts"] == [
        entry | {"encoder": "llama", "taken": 256},
        entry | {"encoder": "clip", "taken": 75},
    ]


# a queue that was put back without its work folders


def lost(loop: Loop, *folders: str) -> list[Path]:
    """Have jobs in the queue, and the work folders of some of them be gone."""
    for folder in ("a", "b", "c"):
        loop.place.drop(folder)
        loop.place.take()
    gone = []
    for folder in folders:
        work = loop.place.config.jobs_dir / loop.place.store.matching(f"{folder}/cat")[0].id
        gone.append(work.rename(loop.place.config.state_dir / f"gone-{folder}"))
    return gone


def test_jobs_without_their_files_are_passed_over_reported_and_run_when_the_files_are_there(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They failed as damaged pictures, and were said to lie beside a text that lay there alone."""
    monkeypatch.setattr("framepackd.supervisor.passed_over.FOLDERS_SECONDS", 0.0)
    first, second = lost(loop, "a", "b")
    loop.round()
    assert started(loop) == ["c"]
    cards, config = loop.daemon.cards, loop.place.config
    a, b = (loop.place.store.matching(f"{folder}/cat")[0] for folder in "ab")
    jobs_dir = loop.place.config.jobs_dir
    assert cards.passed_over.reasons == {
        job.id: f"its files are not in {jobs_dir / job.id}: bring back jobs/ from the same backup as "
        "framepackd.db, or framepackd cancel it and drop the files again"
        for job in (a, b)
    }
    (problem,) = cards.problems
    assert problem.code == "work-folders"
    assert problem.text.startswith(
        f"2 jobs wait for files that are not in {jobs_dir} ({a.id}, {b.id}): bring"
    )
    for _ in range(3):
        loop.round()
    assert caplog.text.count("2 jobs wait") == 1
    assert (a.state, a.attempts, a.delivery) == (State.QUEUED, 0, None)
    second.rename(jobs_dir / b.id)
    loop.worker.send(worker_messages.Failed("no", retry=False))
    loop.round()
    assert started(loop) == ["b"]
    loop.worker.send(worker_messages.Failed("no", retry=False))
    loop.round()
    assert started(loop) == []
    assert loop.paused() == cards.passed_over.why(config), "nothing else is left"
    loop.place.drop("d")
    loop.daemon.scanning.next_scan = 0.0
    loop.daemon.round()
    loop.daemon.round()
    assert started(loop) == ["d"], "what is dropped does not wait for the next look"
    first.rename(jobs_dir / a.id)
    loop.worker.send(worker_messages.Failed("no", retry=False))
    loop.round()
    assert started(loop) == ["a"]
    assert (cards.passed_over.reasons, cards.problems, loop.paused()) == ({}, (), None)


def test_a_job_whose_files_disappear_before_its_turn_is_passed_over(loop: Loop) -> None:
    lost(loop)
    loop.round()
    assert started(loop) == ["a"]
    shutil.rmtree(loop.place.config.jobs_dir / loop.place.store.matching("b/cat")[0].id / "inputs")
    loop.worker.send(worker_messages.Failed("no", retry=False))
    loop.round()
    assert started(loop) == ["c"]


def test_a_queue_of_which_all_files_are_missing_sleeps_between_two_looks(loop: Loop) -> None:
    lost(loop, "a", "b", "c")
    loop.round()
    loop.daemon.scanning.next_scan = loop.daemon.scanning.next_glance = time.monotonic() + 60
    assert loop.daemon.patience > 1


def test_a_job_without_its_files_is_cancelled_and_not_told_that_they_lie_beside(loop: Loop) -> None:
    lost(loop, "a")
    store, config = loop.place.store, loop.place.config
    answer = commands.perform(
        {"command": "cancel", "jobs": ["a/cat"]}, commands.Queue(config, store, loop.daemon.cards)
    )
    assert answer["results"][0]["done"]
    assert store.matching("a/cat")[0].state == State.CANCELLED
    (told,) = (config.failed / "a").iterdir()
    assert told.name == "cat.cancelled.txt"
    text = told.read_text()
    assert "lie beside this one" not in text
    assert "was not in its work folder and is not here: cat.png, cat.txt. To have it made, drop" in text
    assert not list(config.jobs_dir.glob("*/stem"))


def test_a_finished_job_without_its_video_is_not_reported_as_done(loop: Loop) -> None:
    lost(loop, "a")
    job = loop.place.store.matching("a/cat")[0]
    loop.place.store.decide(job.id, State.DONE)
    with pytest.raises(FileNotFoundError, match="bring back jobs/ from a backup"):
        deliveries.settle(
            loop.place.store.get(job.id), loop.place.config, loop.place.store, take_back.bring_back
        )
    assert not list(loop.place.config.outbox.rglob("*.json"))


def test_once_leaves_jobs_without_their_files_in_the_queue_says_so_and_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Loop(tmp_path / "place", monkeypatch, once=True)
    lost(loop, "a", "b", "c")
    assert loop.daemon.run() == 1
    assert loop.counts() == {"queued": 3}
    assert "jobs are left in the queue: 3 jobs wait for files that are not in" in caplog.text


def test_a_run_of_once_names_what_it_leaves_in_the_inbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Loop(tmp_path / "place", monkeypatch, once=True)
    loop.place.drop("sub")
    (loop.place.config.inbox / "sub/cat.txt").unlink()
    assert loop.daemon.run() == 0, "waiting is fine"
    assert "sub/cat is left in the inbox: it waits for cat.txt" in caplog.text


def test_a_run_of_once_delivers_what_ends_while_it_looks_at_the_inbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(tmp_path / "place", monkeypatch, once=True)
    loop.place.drop()
    loop.place.take()
    loop.daemon.round()
    scan = loop.daemon.scanning.round
    answers = [worker_messages.Failed("boom", retry=False)]

    def slowly(now: float, *, hurry: bool) -> None:
        scan(now, hurry=hurry)
        if answers:
            loop.worker.send(answers.pop())

    monkeypatch.setattr(loop.daemon.scanning, "round", slowly)
    while not loop.daemon.finished:
        loop.daemon.round()
    assert loop.counts() == {"failed": 1}


def test_a_worker_that_is_ended_after_its_answer_is_not_reported_as_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loop = Loop(tmp_path / "place", monkeypatch)
    loop.start_job()
    running = loop.supervisor.worker
    assert running is not None
    running.process.is_alive = lambda: not running.connection.closed  # type: ignore[method-assign] # as a real one
    running.process.exitcode = 0  # type: ignore[misc] # of a stand-in
    loop.answer_and_leave(worker_messages.Again("for a test"))
    assert "while idle" not in caplog.text
