"""What happens to jobs when processes are stopped, killed and started again, with real signals."""

import json
import os
import signal
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from framepackd.folders import MARKER
from tests.acceptance.conftest import LONG, Daemon, MakeDaemon


def running(daemon: Daemon) -> bool:
    return any(job["state"] == "running" and job["step"] > 0 for job in daemon.status()["jobs"])


def done(daemon: Daemon) -> bool:
    report = daemon.status()["counts"]
    return report["done"] > 0 and report["queued"] + report["running"] == 0


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_told_to_stop_it_stops_at_the_next_step_and_the_job_goes_on_later(
    daemon: Daemon, how: signal.Signals
) -> None:
    daemon.drop("cat", **LONG)
    daemon.start()
    daemon.until(lambda: running(daemon), "the job to run")
    assert daemon.stop(how) == 0
    assert daemon.command("status").returncode == 3
    report = daemon.status()
    assert report["counts"]["queued"] == 1
    assert report["jobs"][0]["attempts"] == 0, "being stopped is not the job's fault"

    daemon.start()
    daemon.until(lambda: done(daemon), "the job to be done")
    record = json.loads((daemon.outbox / "cat.json").read_text())
    assert record["resumes"] == 1
    assert record["steps_run"] == record["steps_total"], "no work was lost"
    assert record["attempts"] == 0


def test_killed_it_leaves_no_worker_behind_and_goes_on_when_started_again(daemon: Daemon) -> None:
    daemon.drop("cat", **LONG)
    daemon.drop("dog")
    daemon.start()
    daemon.until(lambda: running(daemon), "a job to run")
    worker = daemon.worker()
    daemon.stop(signal.SIGKILL)
    daemon.until(lambda: not Path(f"/proc/{worker}").exists(), "the worker to end", 10)
    assert daemon.command("status").returncode == 1, "it died and left work behind"

    daemon.start()
    daemon.until(lambda: done(daemon), "both jobs to be done")
    assert {path.name for path in daemon.outbox.glob("*.mp4")} == {"cat.mp4", "dog.mp4"}
    record = json.loads((daemon.outbox / "cat.json").read_text())
    assert record["steps_run"] - record["steps_total"] in (0, 1), "at most a step was lost"


def test_a_killed_worker_is_replaced_and_its_attempt_counted(daemon: Daemon) -> None:
    daemon.drop("cat", **LONG)
    daemon.start()
    daemon.until(lambda: running(daemon), "the job to run")
    os.kill(daemon.worker(), signal.SIGSEGV)
    daemon.until(lambda: done(daemon), "the job to be done")
    record = json.loads((daemon.outbox / "cat.json").read_text())
    assert (record["attempts"], record["resumes"]) == (1, 1)
    assert record["steps_run"] - record["steps_total"] in (0, 1), "it went on where it was killed"
    assert any("SIGSEGV" in entry["note"] for entry in record["history"])


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


def test_once_does_what_is_there_tells_by_its_exit_code_and_makes_the_same_of_the_same(
    daemon: Daemon,
) -> None:
    daemon.drop("cat", cache="teacache", steps=8)
    (daemon.inbox / "no-picture.txt").write_text("waits")
    assert daemon.command("run", "--once").returncode == 0
    assert (daemon.outbox / "cat.mp4").exists()
    assert daemon.status()["counts"]["waiting"] == 1

    daemon.drop("dog", steps=0)
    daemon.drop("cat", cache="teacache", steps=8)
    assert daemon.command("run", "--once").returncode == 1
    assert (daemon.failed / "dog.error.txt").exists()
    again = daemon.outbox / "cat_001.mp4"
    assert again.exists(), "a name that is taken is not overwritten"
    assert again.read_bytes() == (daemon.outbox / "cat.mp4").read_bytes()
    for name in ("cat_001.png", "cat_001.txt", "cat_001.json", "cat.png", "cat.json"):
        assert (daemon.outbox / name).exists(), name


def test_a_video_that_cannot_be_delivered_waits_and_is_not_made_again(daemon: Daemon) -> None:
    daemon.drop("sub/cat")
    daemon.outbox.mkdir()
    (daemon.outbox / "sub").write_text("a file where the folder should be")
    assert daemon.command("run", "--once").returncode == 1
    assert daemon.command("status").returncode == 3, "it ended in good order"
    (daemon.outbox / "sub").unlink()
    assert daemon.command("run", "--once").returncode == 0
    record = json.loads((daemon.outbox / "sub/cat.json").read_text())
    assert (record["steps_run"], record["resumes"]) == (record["steps_total"], 0)


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


def test_a_companion_that_comes_too_late_is_listed_with_the_job_it_missed(daemon: Daemon) -> None:
    daemon.drop("cat")
    assert daemon.command("run", "--once").returncode == 0
    (daemon.inbox / "cat_end.png").write_bytes((daemon.outbox / "cat.png").read_bytes())
    assert daemon.command("run", "--once").returncode == 0
    job = daemon.status()["jobs"][0]["id"]
    daemon.start()
    daemon.until(lambda: bool(daemon.status()["waiting"]), "the end frame to be listed")
    assert job in daemon.status()["waiting"][0]["missing"]


@pytest.fixture
def other_filesystem() -> Iterator[Path]:
    """Give a folder on another file system than the temporary folder."""
    shared_memory = Path("/dev/shm")  # noqa: S108 - the point is that it is a file system of its own
    if not shared_memory.is_dir() or shared_memory.stat().st_dev == Path(tempfile.gettempdir()).stat().st_dev:
        pytest.skip("there is no second file system here")
    with tempfile.TemporaryDirectory(dir=shared_memory) as folder:
        yield Path(folder)


def test_folders_may_lie_on_different_file_systems(daemon: Daemon, other_filesystem: Path) -> None:
    for name in ("inbox", "outbox", "failed"):
        path = daemon.root / name
        if path.exists():
            path.rmdir()
        (other_filesystem / name).mkdir()
        path.symlink_to(other_filesystem / name)
    daemon.drop("cat")
    daemon.drop("dog", steps=0)
    assert daemon.command("run", "--once").returncode == 1
    outbox, failed = (
        sorted(path.name for path in folder.iterdir()) for folder in (daemon.outbox, daemon.failed)
    )
    assert outbox == [".framepackd", MARKER, "cat.json", "cat.mp4", "cat.png", "cat.txt", "index.html"]
    assert failed == [MARKER, "dog.error.txt", "dog.png", "dog.toml", "dog.txt"]
    assert not list(daemon.inbox.iterdir())
