"""A real daemon without a card, real bridges and node ends: what becomes of a queue."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from framepackd.jobs.job import Job
from framepackd.jobs.store import JobStore
from tests.daemon.cluster.machines_link import Link

pytestmark = pytest.mark.long  # tests/acceptance/test_two_nodes.py does it by real Ray
PATIENCE = 200.0  # on a machine that others keep busy


@pytest.fixture
def link(tmp_path: Path) -> Iterator[Link]:
    link = Link(tmp_path, "render2", "render3")
    yield link
    link.end()


@contextmanager
def front(folder: Path, link: Link, jobs: str, steps: int = 8) -> Iterator["subprocess.Popen[str]"]:
    """Have a daemon make jobs on other machines alone, and end."""
    (folder / "config.toml").write_text(
        'state_dir = "state"\nmodel = "demo"\nsettle_seconds = 0\n[gpu]\ndevice = []\n[cluster]\n'
        f'nodes = "all"\nsocket = "{link.path}"\n'
        f"[defaults]\nseconds = 1\nsteps = {steps}\nwidth = 32\nheight = 32\n"
    )
    inbox = folder / "state/inbox"
    inbox.mkdir(parents=True)
    for name in jobs:
        Image.new("RGB", (32, 32), "teal").save(inbox / f"{name}.png")
        (inbox / f"{name}.txt").write_text("sunset")
    words = ["-m", "framepackd", "run", "--once", "--config", str(folder / "config.toml")]
    with subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True) as daemon:
        try:
            yield daemon
        finally:
            daemon.kill()


def ended(folder: Path) -> dict[str, Job]:
    store = JobStore(folder / "state/framepackd.db", read_only=True)
    return {job.name: job for job in store.all_jobs()}


def test_a_queue_is_made_on_other_machines(tmp_path: Path, link: Link) -> None:
    with front(tmp_path, link, "ab") as daemon:
        _, said = daemon.communicate(timeout=PATIENCE)
    assert daemon.returncode == 0, said
    jobs = ended(tmp_path)
    assert {job.state for job in jobs.values()} == {"done"}
    assert {job.device for job in jobs.values()} == {"render2:cpu", "render3:cpu"}
    for name in "ab":
        made = json.loads((tmp_path / f"state/outbox/{name}.json").read_text())
        assert (tmp_path / f"state/outbox/{name}.mp4").stat().st_size > 0, made


def test_a_job_of_a_machine_that_dies_goes_on_on_another_and_loses_no_attempt(
    tmp_path: Path, link: Link
) -> None:
    link.alive["render3"] = False
    with front(tmp_path, link, "a", steps=100) as daemon:  # it runs for longer than all that follows
        database = tmp_path / "state/framepackd.db"
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if database.exists() and any(job.step >= 2 for job in ended(tmp_path).values()):
                break
            time.sleep(0.02)
        link.alive["render3"] = True
        time.sleep(1)  # the daemon is told within 0.3 s; with --once it ends when no card is left
        link.kill("render2")
        _, said = daemon.communicate(timeout=PATIENCE)
    assert daemon.returncode == 0, said
    job = ended(tmp_path)["a"]
    assert (job.state, job.device, job.attempts, job.resumes) == ("done", "render3:cpu", 0, 1)
    assert job.steps_run <= job.steps_total + 1
