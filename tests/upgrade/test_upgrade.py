"""This version is started on what older ones have left, and every job ends whole.

Twice: with checkpoints that fit, as on the machine that made them, and with such as were made elsewhere or
with other libraries. What is made from the beginning there is what the others are held against.
"""

import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framepack_core.media.pictures import count_frames
from framepack_core.media.video_reader import pictures
from framepack_core.models import contents
from framepackd.jobs.job import Job, State
from framepackd.jobs.store import JobStore
from framepackd.settings.config import load_config
from framepackd.supervisor.supervisor import Supervisor
from framepackd.worker import identity
from tests.acceptance.conftest import Daemon
from tests.upgrade.make import HERE, JOBS, drop
from tests.upgrade.states import header_of, reidentified

pytestmark = pytest.mark.timeout(600)
ARCHIVES = sorted(HERE.glob("state-*.tar.gz"))
UNFINISHED = ("chain", "decoded", "running", "queued")  # as they were left, in no order
BEGUN = ("chain", "decoded", "running")
CLOSE = 3.0  # levels of 255 on average, where another processor rounds otherwise
AGAIN = ("finished", "failed")  # dropped again, to be made from the beginning


@dataclass
class Place:
    """A state folder of an older version, unpacked, and this version's daemon on it."""

    daemon: Daemon
    before: dict[str, bytes]  # what lay in outbox and failed folder

    @property
    def store(self) -> JobStore:
        return JobStore(self.daemon.state / "framepackd.db")

    def job(self, name: str) -> Job:
        """Give the job that was there, not one that was dropped again."""
        return self.store.matching(name)[-1]

    def video(self, name: str) -> Path:
        return self.daemon.outbox / f"{name}.mp4"

    def run(self) -> None:
        done = self.daemon.command("run", "--once")
        assert done.returncode == 0, done.stderr


def unpacked(archive: Path, root: Path) -> Place:
    """Unpack it as if it had been left a moment ago: what is kept for some days only is still there."""
    with tarfile.open(archive) as packed:
        packed.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.2 has none yet
        for entry in packed:
            entry.mtime = time.time()
        packed.extractall(root)  # noqa: S202 - ours
    daemon = Daemon(root, settle_seconds=0.1, config='on_duplicate = "run"\n')
    return Place(daemon, lying(daemon))


def lying(daemon: Daemon) -> dict[str, bytes]:
    files = (path for folder in (daemon.outbox, daemon.failed) for path in folder.iterdir() if path.is_file())
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}


def made_here(place: Place) -> None:
    """Have the checkpoints be such as this version makes on this machine."""
    supervisor = Supervisor(load_config(place.daemon.config), place.store)
    for state in (place.daemon.state / "jobs").rglob("state-*"):
        (job_id,) = (part for part in state.parts if part in place.store.states())
        work = supervisor.work_of(place.store.get(job_id))
        ours = identity.of(work, contents.digest(work.spec)) | identity.computation(work)
        state.write_bytes(reidentified(state.read_bytes(), lambda _, ours=ours: ours))


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda archive: archive.name)
def archive(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As when the archives were made: more would sum up in another order."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def elsewhere(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The daemon has run on it, and could use no checkpoint."""
    place = unpacked(archive, tmp_path_factory.mktemp("elsewhere"))
    for state in (place.daemon.state / "jobs").rglob("state-*"):
        assert "made-here" in str(header_of(state.read_bytes())["identity"]["model"])
    for name in AGAIN:
        drop(place.daemon.inbox, name)
    place.run()
    return place


@pytest.fixture(scope="module")
def here(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The daemon has run on it and could use all checkpoints; the failed job was tried again."""
    place = unpacked(archive, tmp_path_factory.mktemp("here"))
    made_here(place)
    states = {job["name"]: job["state"] for job in place.daemon.status()["jobs"]}
    ended = {"finished": "done", "finished-f1": "done", "failed": "failed", "cancelled": "cancelled"}
    assert states == {**dict.fromkeys(UNFINISHED, "queued"), "running": "running", **ended}
    retried = place.daemon.command("retry", "failed")
    assert retried.returncode == 0, retried.stderr
    place.run()
    return place


@pytest.fixture(params=["elsewhere", "here"])
def place(request: pytest.FixtureRequest, elsewhere: Place, here: Place) -> Place:
    return elsewhere if request.param == "elsewhere" else here


def test_every_job_that_was_left_ends_whole(place: Place, elsewhere: Place) -> None:
    for name in UNFINISHED:
        job = place.job(name)
        assert (job.state, job.attempts) == (State.DONE, 0), (name, job.error, job.history)
        assert count_frames(place.video(name)) == job.frames
        assert job.steps_run >= job.steps_total
        assert (job.section, job.step) == (job.sections, job.steps)
        stills = place.daemon.outbox.glob(f"{name}.section-*.png")
        assert len(list(stills)) == (job.sections if JOBS[name].get("save_section_frames") else 0)
    assert not list(place.daemon.inbox.iterdir())
    left = {path.name for path in (place.daemon.state / "jobs").iterdir()}
    assert left == ({place.job("failed").id} if place is elsewhere else set()), "what a retry goes on from"


def test_what_had_ended_stays_as_it_was(place: Place, here: Place) -> None:
    assert [place.job(name).state for name in ("finished", "finished-f1", "cancelled")] == [
        State.DONE,
        State.DONE,
        State.CANCELLED,
    ]
    now = lying(place.daemon)
    for name, content in place.before.items():
        retried = place is here and name.startswith("failed/failed.")
        assert name.endswith("index.html") or retried or now[name] == content, name


def test_checkpoints_that_do_not_fit_are_reported_kept_and_cost_no_attempt(elsewhere: Place) -> None:
    for name in BEGUN:
        notes = [entry["note"] for entry in elsewhere.job(name).history]
        told = [note for note in notes if "beginning anew" in note]
        assert len(told) == (2 if name == "chain" else 1), notes  # one for each clip
        assert all("was made with another model" in note and ".aside-1" in note for note in told)
        assert elsewhere.job(name).steps_run > elsewhere.job(name).steps_total
    assert elsewhere.job("queued").steps_run == elsewhere.job("queued").steps_total
    failed = elsewhere.job("failed")
    assert failed.state == State.FAILED
    assert list((elsewhere.daemon.state / "jobs" / failed.id / "checkpoint").glob("state-*"))


def test_checkpoints_that_fit_are_resumed(here: Place) -> None:
    for name in (*BEGUN, "failed"):
        job = here.job(name)
        assert not [entry for entry in job.history if "aside" in entry["note"]]
        assert job.state == State.DONE
        assert job.steps_run - job.steps_total <= (2 if JOBS[name].get("cache") else 1)


def test_a_video_that_was_begun_before_is_as_if_it_had_been_made_at_once(
    elsewhere: Place, here: Place
) -> None:
    """To the bit, where this machine computes as the one did on which it was begun."""
    same_machine = elsewhere.before["outbox/finished.mp4"] == elsewhere.video("finished_001").read_bytes()
    for name in (*UNFINISHED, "failed"):
        begun, anew = here.video(name), elsewhere.video(name)
        if same_machine:
            assert begun.read_bytes() == anew.read_bytes(), name
        assert np.abs(pixels(begun) - pixels(anew)).mean() < CLOSE, name


def pixels(video: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.stack(list(pictures(video))).astype(np.float32)
