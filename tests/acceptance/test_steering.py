"""retry, cancel, top, pause, resume on real processes: while a daemon runs, and while none does."""

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from framepack_core.media.pictures import count_frames, picture_size
from tests.acceptance.conftest import LONG, Daemon, MakeDaemon, ending

SEED = "random"


def state_of(daemon: Daemon, name: str) -> str:
    return next((str(job["state"]) for job in daemon.status()["jobs"] if job["name"] == name), "")


def runs(daemon: Daemon, name: str) -> bool:
    jobs = daemon.status()["jobs"]
    return any(job["name"] == name and job["state"] == "running" and job["step"] > 0 for job in jobs)


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Have a daemon for several tests, one after the other."""
    daemon = Daemon(tmp_path_factory.mktemp("steered"))
    with ending([daemon]):
        yield daemon


def test_a_running_daemon_is_paused_steered_and_resumed(steered: Daemon) -> None:
    daemon = steered
    for name in ("ant", "bee", "cat"):
        daemon.drop(name, **(LONG if name == "ant" else {}))
    daemon.start()
    daemon.until(lambda: runs(daemon, "ant"), "the first job to run")

    worker = daemon.worker()
    assert daemon.command("pause").returncode == 0
    daemon.until(lambda: state_of(daemon, "ant") == "queued", "the job to stop at its next step")
    daemon.until(lambda: not Path(f"/proc/{worker}").exists(), "the worker to give back its memory", 15)
    report = daemon.status()
    assert "framepackd resume goes on" in report["daemon"]["paused"]
    assert report["jobs"][0]["name"] == "ant", "it keeps its place"
    assert report["jobs"][0]["attempts"] == 0
    assert "paused" in daemon.command("status").stdout

    assert daemon.stop() == 0  # a pause outlives the daemon
    assert "framepackd resume goes on" in daemon.status()["daemon"]["paused"]
    daemon.start()
    daemon.drop("dog")
    daemon.until(lambda: state_of(daemon, "dog") == "queued", "files to be taken in all the same")

    assert daemon.command("top", "dog", "cat").returncode == 0
    assert [job["name"] for job in daemon.status()["jobs"]] == ["dog", "cat", "ant", "bee"]
    cancelled = daemon.command("cancel", "bee", "nobody")
    assert cancelled.returncode == 1
    assert "(bee) is cancelled" in cancelled.stdout
    assert "no job 'nobody'" in cancelled.stderr
    assert (daemon.failed / "bee.cancelled.txt").exists()

    assert daemon.command("resume").returncode == 0
    daemon.until(lambda: runs(daemon, "ant"), "the first job to run again")
    assert (daemon.outbox / "dog.mp4").exists()
    daemon.until(
        (daemon.outbox / "cat.mp4").exists, "the one before it to be delivered, which it does not wait for"
    )
    assert "stops at its next step" in daemon.command("cancel", "ant", "--keep").stdout
    daemon.until(lambda: state_of(daemon, "ant") == "cancelled", "the running job to be cancelled")
    assert (daemon.failed / "ant.cancelled.txt").exists()

    assert daemon.command("retry", "bee").returncode == 0
    daemon.until(lambda: state_of(daemon, "bee") == "done", "the cancelled job to be made after all")
    assert not list(daemon.failed.glob("bee*"))


@pytest.mark.parametrize("name", ["running", pytest.param("queued", marks=pytest.mark.long)])
def test_what_exists_of_a_cancelled_video_is_kept_if_that_is_wished(steered: Daemon, name: str) -> None:
    daemon = steered
    daemon.drop(name, **LONG)
    if daemon.process is None:
        daemon.start()
    daemon.until(lambda: second_section(daemon, name), "it to be half done")
    preview, picture = (Path(shown(daemon, name)[key]) for key in ("preview", "preview_picture"))
    assert picture_size(picture) > (0, 0)
    assert count_frames(preview) in range(4 * 3 - 3, 2 * 30, 4 * 3)
    if name == "queued":
        daemon.stop()
    assert daemon.command("cancel", "--keep", name).returncode == 0
    if name == "queued":
        daemon.start()
    daemon.until(lambda: (daemon.failed / f"{name}.mp4").exists(), "what exists of it")
    frames = count_frames(daemon.failed / f"{name}.mp4")
    assert frames in range(4 * 3 - 3, 2 * 30, 4 * 3), "whole sections of window 3, and not all"
    assert (daemon.failed / f"{name}.cancelled.txt").exists()
    daemon.until(lambda: state_of(daemon, name) == "cancelled", "the job to end")
    assert not preview.exists()
    assert not picture.exists()
    assert shown(daemon, name)["preview"] is None
    assert shown(daemon, name)["preview_picture"] is None
    assert not list(daemon.outbox.glob(f"{name}*"))


def shown(daemon: Daemon, name: str) -> dict[str, Any]:
    job: dict[str, Any] = json.loads(daemon.command("show", name, "--json").stdout)
    return job


def second_section(daemon: Daemon, name: str) -> bool:
    jobs = daemon.status()["jobs"]
    return any(job["name"] == name and job["section"] >= 2 and job["state"] == "running" for job in jobs)


def test_without_a_daemon_the_commands_do_it_themselves(daemon: Daemon) -> None:
    nothing = daemon.command("cancel", "cat")
    assert (nothing.returncode, len(nothing.stderr.splitlines())) == (1, 1)
    assert daemon.command("pause").returncode == 0
    daemon.drop("ant", seed=SEED)
    daemon.drop("bee")
    daemon.drop("cat", steps=0)
    paused = daemon.command("run", "--once")
    assert paused.returncode == 1, "it does not wait for better times, and says so"
    assert "framepackd resume goes on" in paused.stderr
    assert (daemon.failed / "cat.error.txt").exists(), "intake and delivery go on"

    assert daemon.command("top", "bee").returncode == 0
    assert [job["name"] for job in daemon.status()["jobs"]][:2] == ["bee", "ant"]
    assert daemon.command("cancel", "ant").returncode == 0
    assert state_of(daemon, "ant") == "cancelled"
    seed = json.loads(daemon.command("show", "ant", "--json").stdout)["seed"]
    assert daemon.command("cancel", "ant").returncode == 1
    assert daemon.command("retry", "ant").returncode == 0
    wrong = daemon.command("retry", "cat")
    assert wrong.returncode == 1
    assert "steps must be 1 to 100, got 0" in wrong.stderr
    (daemon.failed / "cat.toml").write_text("steps = 1\n")
    assert daemon.command("retry", "cat").returncode == 0, "it lies in the failed folder again"
    assert daemon.command("resume").returncode == 0
    assert daemon.command("run", "--once").returncode == 0
    assert json.loads((daemon.outbox / "ant.json").read_text())["seed"] == seed
    assert {path.name for path in daemon.outbox.glob("*.mp4")} == {"ant.mp4", "bee.mp4", "cat.mp4"}


@pytest.mark.long  # the rule is tested on the store, and on the commands where no daemon runs
def test_a_job_cancelled_after_its_daemon_was_killed_never_runs_again(daemon: Daemon) -> None:
    daemon.drop("cat", **LONG)
    daemon.start()
    daemon.until(lambda: runs(daemon, "cat"), "the job to run")
    assert daemon.process is not None
    daemon.process.kill()
    daemon.process.wait()
    assert daemon.command("cancel", "cat").returncode == 0
    assert daemon.command("run", "--once").returncode == 0
    assert daemon.status()["counts"]["cancelled"] == 1


@pytest.mark.long
def test_a_database_locked_for_long_by_another_program_costs_nothing(daemon: Daemon) -> None:
    daemon.drop("cat", **LONG)
    daemon.start()
    daemon.until(lambda: runs(daemon, "cat"), "the job to run")
    with closing(sqlite3.connect(daemon.state / "framepackd.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        daemon.until(lambda: bool(daemon.status()["daemon"]["paused"]), "the daemon to say so")
        assert "another program holds it" in daemon.status()["daemon"]["paused"]
    daemon.until(lambda: state_of(daemon, "cat") == "done", "the job to be done")
    record = json.loads((daemon.outbox / "cat.json").read_text())
    assert (record["steps_run"], record["attempts"], record["resumes"]) == (record["steps_total"], 0, 0)


@pytest.mark.long
def test_a_model_that_arrives_later_is_waited_for(make_daemon: MakeDaemon) -> None:
    from framepack_core.models.registry import BUILT_IN

    demo = BUILT_IN["demo"]
    models = '[models.mine]\nkind = "framepack"\ntransformer = "./mine"\n'
    models += f'base = "{demo.base.folder}"\nimage_encoder = "{demo.image_encoder.folder}"\n'
    daemon = make_daemon(models=models)
    (daemon.root / "mine").mkdir()
    daemon.drop("cat", model="mine")
    daemon.start()
    daemon.until(lambda: bool(daemon.status()["daemon"]["paused"]), "the daemon to say what is missing")
    assert "config.json is missing" in daemon.status()["daemon"]["paused"]
    shutil.copytree(demo.transformer.folder, daemon.root / "mine", dirs_exist_ok=True)
    daemon.until(lambda: state_of(daemon, "cat") == "done", "the job to be done")


@pytest.mark.parametrize("spoil", ["garbage", "folder"])
def test_a_database_that_cannot_be_used_is_said_in_one_line(daemon: Daemon, spoil: str) -> None:
    daemon.state.mkdir()
    database = daemon.state / "framepackd.db"
    database.write_text("garbage " * 1000) if spoil == "garbage" else database.mkdir()
    for command, code in (("run", 1), ("status", 4), ("retry", 1), ("pause", 1)):
        answer = daemon.command(command, *(["cat"] if command == "retry" else []))
        assert answer.returncode == code, answer.stderr
        assert len(answer.stderr.splitlines()) == 1, answer.stderr
        assert str(database) in answer.stderr
    assert database.is_dir() or database.read_text() == "garbage " * 1000
