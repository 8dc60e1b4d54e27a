"""What happens to jobs when processes are stopped, killed and started again, with real signals."""

import json
import os
import re
import signal
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from framepackd.folders import MARKER
from framepackd.jobs.job import Job, State
from framepackd.jobs.store import JobStore
from tests.acceptance.conftest import LONG, Daemon, MakeDaemon, ending, picture


def running(daemon: Daemon) -> bool:
    return any(job["state"] == "running" and job["step"] > 0 for job in daemon.status()["jobs"])


def done(daemon: Daemon) -> bool:
    report = daemon.status()["counts"]
    return report["done"] > 0 and report["queued"] + report["running"] == 0


@dataclass
class Survivor:
    """What was seen of one job, whose daemon was stopped, whose worker died, and whose daemon was killed."""

    daemon: Daemon
    exit_code: int  # of the daemon that was stopped
    stopped: Job  # as it was then
    killed: Job  # as it was when the daemon was killed

    @property
    def resumed(self) -> list[int]:
        """The steps after which each start but the first began, of all the job's steps."""
        return resumptions(self.daemon)

    @property
    def lost_with_the_daemon(self) -> int:
        """The steps it had heard of and made again; it may die before it hears of steps that are kept."""
        return max(steps_done(self.killed.section, self.killed.step) - self.resumed[2], 0)

    @property
    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads((self.daemon.outbox / "cat.json").read_text())
        return record


def resumptions(daemon: Daemon) -> list[int]:
    return [int(step) for step in re.findall(r": resumed after step (\d+) of 500", daemon.log.read_text())]


def steps_done(section: int, step: int) -> int:
    return (section - 1) * LONG["steps"] + step


def cat(daemon: Daemon) -> Job:
    return JobStore(daemon.state / "framepackd.db").matching("cat")[-1]


def goes_on(daemon: Daemon, resumed: int) -> bool:
    """Tell whether, resumed so often, it has done a step."""
    began = resumptions(daemon)
    jobs = (job for job in daemon.status()["jobs"] if job["name"] == "cat" and job["state"] == "running")
    return len(began) == resumed and any(
        steps_done(job["section"], job["step"]) > max(began, default=0) for job in jobs
    )


@pytest.fixture(scope="module", params=[signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def survivor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Survivor]:
    """Each is seen by a test of its own; together, as each start of a worker takes seconds."""
    daemon = Daemon(tmp_path_factory.mktemp("survivor"))
    daemon.drop("cat", **LONG)
    daemon.drop("dog")
    with ending([daemon]):
        daemon.start()
        daemon.until(lambda: goes_on(daemon, 0), "the job to run")
        exit_code = daemon.stop(request.param)
        assert daemon.command("status").returncode == 3
        stopped = cat(daemon)

        daemon.start()
        daemon.until(lambda: goes_on(daemon, 1), "the job to go on")
        os.kill(daemon.worker(), signal.SIGSEGV)
        daemon.until(lambda: goes_on(daemon, 2), "another worker to go on with the job")
        worker = daemon.worker()
        daemon.stop(signal.SIGKILL)
        daemon.until(lambda: not Path(f"/proc/{worker}").exists(), "the worker to end", 10)
        assert daemon.command("status").returncode == 1, "it died and left work behind"
        killed = cat(daemon)

        daemon.start()
        daemon.until(lambda: done(daemon), "both jobs to be done")
        yield Survivor(daemon, exit_code, stopped, killed)


def test_told_to_stop_it_stops_at_the_next_step_and_the_job_goes_on_later(survivor: Survivor) -> None:
    assert survivor.exit_code == 0
    assert survivor.stopped.state == State.QUEUED
    assert survivor.stopped.attempts == 0, "being stopped is not the job's fault"
    assert survivor.resumed[0] == survivor.stopped.steps_run, "no work was lost"


def test_a_killed_worker_is_replaced_and_its_attempt_counted(survivor: Survivor) -> None:
    record = survivor.record
    assert (record["attempts"], record["resumes"]) == (1, 3)
    lost = record["steps_run"] - record["steps_total"] - survivor.lost_with_the_daemon
    assert lost in (0, 1), "it went on where it was killed"
    assert any("SIGSEGV" in entry["note"] for entry in record["history"])


def test_killed_it_leaves_no_worker_behind_and_goes_on_when_started_again(survivor: Survivor) -> None:
    assert {path.name for path in survivor.daemon.outbox.glob("*.mp4")} == {"cat.mp4", "dog.mp4"}
    assert survivor.killed.attempts == survivor.record["attempts"], "it is not the job's fault"
    assert survivor.lost_with_the_daemon in (0, 1), "at most a step was lost"


@pytest.mark.long
def test_a_worker_that_hangs_is_ended_and_its_job_goes_on(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(config="hang_seconds = 8\n")
    daemon.drop("cat", **LONG)
    daemon.start()
    daemon.until(lambda: running(daemon) and daemon.status()["jobs"][0]["step"] >= 3, "three steps")
    os.kill(daemon.worker(), signal.SIGSTOP)
    daemon.until(lambda: done(daemon), "the job to be done")
    record = json.loads((daemon.outbox / "cat.json").read_text())
    assert record["attempts"] == 1
    assert record["steps_run"] - record["steps_total"] in (0, 1)
    assert any("it did nothing for" in entry["note"] for entry in record["history"])


@pytest.mark.long
def test_stopped_and_continued_as_a_whole_it_does_not_mistake_its_worker_for_hung(
    make_daemon: MakeDaemon,
) -> None:
    daemon = make_daemon(config="hang_seconds = 6\n")
    daemon.drop("cat", **LONG)
    daemon.start()
    assert daemon.process is not None
    daemon.until(lambda: running(daemon) and daemon.status()["jobs"][0]["step"] >= 3, "three steps")
    family = (daemon.worker(), daemon.process.pid)
    for process in family:
        os.kill(process, signal.SIGSTOP)
    time.sleep(8)
    for process in family:
        os.kill(process, signal.SIGCONT)
    daemon.until(lambda: done(daemon), "the job to be done")
    assert json.loads((daemon.outbox / "cat.json").read_text())["attempts"] == 0


@pytest.mark.long
def test_a_job_that_keeps_killing_its_worker_fails_and_the_queue_goes_on(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(config="max_attempts = 2\n")
    daemon.drop("cat", **LONG)
    daemon.start()
    for attempt in range(2):
        daemon.until(
            lambda attempt=attempt: running(daemon) and daemon.status()["jobs"][0]["attempts"] == attempt,
            "the job to run",
        )
        os.kill(daemon.worker(), signal.SIGKILL)
    daemon.until(lambda: daemon.status()["counts"]["failed"] == 1, "the job to fail")
    reason = (daemon.failed / "cat.error.txt").read_text()
    assert "gave up after 2 attempts" in reason
    assert "SIGKILL" in reason
    daemon.drop("dog")
    daemon.until(lambda: done(daemon), "the next job to be done")

    assert daemon.command("retry", "cat").returncode == 0
    daemon.until(lambda: (daemon.outbox / "cat.mp4").exists(), "the job to be done after all")
    record = json.loads((daemon.outbox / "cat.json").read_text())
    assert record["steps_run"] - record["steps_total"] in (0, 1, 2), "it went on where it had failed"
    daemon.until(lambda: not list((daemon.state / "jobs").iterdir()), "its work folder to go", 10)


def test_a_second_daemon_on_the_same_state_folder_refuses_to_start(daemon: Daemon) -> None:
    daemon.start()
    assert daemon.process is not None
    for command in (("run",), ("run", "--once")):
        second = daemon.command(*command)
        assert second.returncode == 75
        assert f"pid {daemon.process.pid}" in second.stderr
        assert len(second.stderr.splitlines()) == 1
    assert daemon.command("status").returncode == 0


@pytest.mark.long
def test_a_job_whose_model_has_left_the_config_fails_and_the_queue_goes_on_at_once(
    make_daemon: MakeDaemon,
) -> None:
    daemon = make_daemon(config="poll_seconds = 3600\n")
    daemon.drop("cat", **LONG)
    daemon.drop("dog", model="demo")
    daemon.start()
    daemon.until(lambda: running(daemon), "a job to run")
    daemon.stop()
    with sqlite3.connect(daemon.state / "framepackd.db") as database:
        database.execute("UPDATE job SET settings = json_set(settings, '$.model', 'gone') WHERE name = 'cat'")
    database.close()
    assert daemon.command("run", "--once").returncode == 1
    assert "do not fit the config" in (daemon.failed / "cat.error.txt").read_text()
    assert (daemon.outbox / "dog.mp4").exists()


@pytest.mark.long
def test_the_same_job_again_is_skipped_where_that_is_wanted(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(config='on_duplicate = "skip"\n')
    for _ in range(2):
        daemon.drop("cat")
        assert daemon.command("run", "--once").returncode == 0
    daemon.drop("cat", seed=1)
    assert daemon.command("run", "--once").returncode == 0
    counts = daemon.status()["counts"]
    assert (counts["done"], counts["skipped"]) == (2, 1)
    record = json.loads((daemon.outbox / "cat_001.json").read_text())
    assert record["state"] == "skipped"
    assert str(daemon.outbox / "cat.mp4") in record["error"]


@pytest.fixture(scope="module")
def other_filesystem() -> Iterator[Path]:
    """Give a folder on another file system than the temporary folder."""
    shared_memory = Path("/dev/shm")  # noqa: S108 - the point is that it is a file system of its own
    if not shared_memory.is_dir() or shared_memory.stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev:
        pytest.skip("there is no second file system here")
    with tempfile.TemporaryDirectory(dir=shared_memory) as folder:
        yield Path(folder)


@dataclass(frozen=True)
class Batches:
    """What runs with ``--once`` on the same folders, on another file system, ended with."""

    daemon: Daemon
    codes: dict[str, int]  # what the commands ended with
    waiting: int  # drops that were not whole, after the first run


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory, other_filesystem: Path) -> Iterator[Batches]:
    """Each rule is seen by a test of its own; together, as each start of a worker takes seconds."""
    daemon = Daemon(tmp_path_factory.mktemp("batches"))
    daemon.inbox.rmdir()
    for folder in (daemon.inbox, daemon.outbox, daemon.failed):
        (other_filesystem / folder.name).mkdir()
        folder.symlink_to(other_filesystem / folder.name)
    codes: dict[str, int] = {}

    def once(what: str) -> None:
        codes[what] = daemon.command("run", "--once").returncode

    daemon.drop("cat", cache="teacache", steps=8)
    (daemon.inbox / "no-picture.txt").write_text("waits")
    once("made")
    waiting = daemon.status()["counts"]["waiting"]

    daemon.drop("cat", cache="teacache", steps=8)
    daemon.drop("sub/bird")
    (daemon.outbox / "sub").write_text("a file where the folder should be")
    once("not delivered")
    codes["status"] = daemon.command("status").returncode

    (daemon.outbox / "sub").unlink()
    once("delivered")

    picture(daemon.inbox / "sub/bird_end.png")
    once("too late")

    daemon.drop("dog", steps=0)
    once("wrong")
    with ending([daemon]):
        yield Batches(daemon, codes, waiting)


def test_once_does_what_is_there_tells_by_its_exit_code_and_makes_the_same_of_the_same(
    batches: Batches,
) -> None:
    daemon, codes = batches.daemon, batches.codes
    assert (codes["made"], codes["wrong"]) == (0, 1)
    assert batches.waiting == 1
    assert (daemon.failed / "dog.error.txt").exists()
    again = daemon.outbox / "cat_001.mp4"
    assert again.exists(), "a name that is taken is not overwritten"
    assert again.read_bytes() == (daemon.outbox / "cat.mp4").read_bytes()
    for name in ("cat_001.png", "cat_001.txt", "cat_001.json", "cat.png", "cat.json"):
        assert (daemon.outbox / name).exists(), name


def test_a_video_that_cannot_be_delivered_waits_and_is_not_made_again(batches: Batches) -> None:
    assert batches.codes["not delivered"] == 1
    assert batches.codes["status"] == 3, "it ended in good order"
    assert batches.codes["delivered"] == 0
    record = json.loads((batches.daemon.outbox / "sub/bird.json").read_text())
    assert (record["steps_run"], record["resumes"]) == (record["steps_total"], 0)


def test_folders_may_lie_on_different_file_systems(batches: Batches) -> None:
    daemon = batches.daemon
    outbox, failed, inbox = (
        sorted(path.name for path in folder.iterdir())
        for folder in (daemon.outbox, daemon.failed, daemon.inbox)
    )
    cats = [f"cat{again}.{kind}" for again in ("", "_001") for kind in ("json", "mp4", "png", "toml", "txt")]
    assert outbox == [".framepackd", MARKER, *cats, "index.html", "sub"]
    assert failed == [MARKER, "dog.error.txt", "dog.png", "dog.toml", "dog.txt"]
    assert inbox == ["no-picture.txt", "sub"]
    assert [path.name for path in (daemon.inbox / "sub").iterdir()] == ["bird_end.png"]


def test_a_companion_that_comes_too_late_is_listed_with_the_job_it_missed(batches: Batches) -> None:
    daemon = batches.daemon
    assert batches.codes["too late"] == 0
    job = next(job["id"] for job in daemon.status()["jobs"] if job["name"] == "bird")
    daemon.start()

    def listed() -> list[str]:
        waiting = daemon.status()["waiting"]
        return [entry["missing"] for entry in waiting if entry["folder"] == "sub"]

    daemon.until(lambda: bool(listed()), "the end frame to be listed")
    assert job in listed()[0]
