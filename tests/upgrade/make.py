"""Makes a state folder as this version leaves one behind: ``python -m tests.upgrade.make``.

Run by hand, once for each version that people have; what it writes is kept for good, and every later version
is started on it. A queue is begun, killed again and again, and packed as it is then: see ``fill``. Paths of
the machine that made it are replaced; the test puts its own in their place.
"""

import json
import os
import shutil
import signal
import sqlite3
import sys
import tarfile
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import framepack_core
from framepackd.control import commands
from framepackd.jobs.job import State
from framepackd.jobs.store import JobStore
from framepackd.settings.config import load_config
from tests.acceptance.conftest import TINY, picture
from tests.crash.harness import REPOSITORY, UNDISTURBED, Life
from tests.crash.jobs import Folders
from tests.crash.victim import Plan
from tests.started.forking import worker_of
from tests.upgrade.states import reidentified

HERE = Path(__file__).parent
# What stands in the files for where it was made; no such paths need to exist.
PLACE, PACKAGE = "/srv/framepackd-made-here", "/opt/framepackd-made-here"
PACKED = ("inbox", "outbox", "failed", "state")
NOT_PACKED = ("lock", "control.sock")

# By name: settings. Each has two sections, the chain two clips of two.
JOBS: dict[str, dict[str, Any]] = {
    "finished": {"steps": 2},
    "finished-f1": {"steps": 2, "model": "demo-f1", "save_section_frames": True},
    "cancelled": {"steps": 3},
    "failed": {"steps": 20},
    "chain": {"steps": 2, "save_section_frames": True},
    "decoded": {"steps": 3, "model": "demo-f1", "save_section_frames": True, "keep_latents": True},
    "running": {"steps": 4, "cache": "teacache"},
    "queued": {"steps": 2},
}
STEP = "step:generation._take_step:after send StepDone"
# After how many steps the daemon is killed under a job.
KILLED_AFTER = {"cancelled": 1, "chain": 6, "decoded": 4, "running": 3}


@dataclass(frozen=True)
class Making(Folders):
    """The folders while they are filled."""

    jobs: tuple[str, ...] = field(default=tuple(JOBS))

    def drop(self, name: str) -> None:
        """Drop a job's files into the inbox."""
        drop(self.inbox, name)

    def store(self) -> JobStore:
        """Open the queue; no daemon may run."""
        return JobStore(self.state / "framepackd.db")


def drop(inbox: Path, name: str) -> None:
    """Drop the files of one of the jobs."""
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in {**JOBS[name], "seed": 7}.items()]
    (inbox / f"{name}.toml").write_text("".join(lines))
    (inbox / f"{name}.txt").write_text(f"pan left, {name}")
    seed = list(JOBS).index(name)
    if name == "chain":
        for number in range(3):
            picture(inbox / f"{name}_frame_{number}.png", seed=100 + number)
    else:
        picture(inbox / f"{name}.png", seed=seed)


def fill(place: Making) -> None:
    """Leave two finished jobs, a cancelled and a failed one, three that were begun, and one that was not."""
    for name in ("finished", "finished-f1"):
        place.drop(name)
    _live(place, UNDISTURBED)
    _begin(place, "cancelled")
    config, store = load_config(place.config), place.store()
    store.recover()
    assert commands.perform({"command": "cancel", "jobs": ["cancelled"]}, commands.Queue(config, store))
    _fail(place)
    for name in ("chain", "decoded"):
        _begin(place, name)
        place.store().recover()
        # The next one is to run first: this one waits, with what it has.
        store.pause()
        _live(place, UNDISTURBED)
        store.resume()
    _begin(place, "running", "queued")


def _begin(place: Making, name: str, *others: str) -> None:
    """Have a job run, and kill the daemon under it."""
    for each in (name, *others):
        place.drop(each)
    store = place.store()
    store.pause()  # until both are taken in and it is clear which comes first
    _live(place, UNDISTURBED)
    store.move_to_front(store.matching(name)[0].id)
    store.resume()
    _live(place, Plan(labels=(STEP,), occurrence=KILLED_AFTER[name]))
    (running,) = place.store().in_state(State.RUNNING)
    assert running.name == name, running.name


def _live(place: Making, plan: Plan) -> None:
    with Life(place, plan) as life:
        life.end()


def _fail(place: Making) -> None:
    """Have a job fail for good, in its second section, because its worker dies."""
    place.drop("failed")
    with Life(place, UNDISTURBED) as life:
        while not any(job.section == 2 and job.step > 1 for job in place.store().in_state(State.RUNNING)):
            time.sleep(0.005)
            assert life.alive
        worker = worker_of(life.process.pid)
        assert worker is not None
        os.kill(worker, signal.SIGKILL)
        life.end()
    assert [job.name for job in place.store().in_state(State.FAILED)] == ["failed"]


def scrub(root: Path) -> None:
    """Replace the paths of this machine wherever they are recorded."""
    paths = {str(root): PLACE, str(REPOSITORY): PACKAGE}
    with closing(sqlite3.connect(root / "state/framepackd.db")) as database:
        for column in ("output", "model_sources", "settings", "error", "history"):
            for theirs, ours in paths.items():
                database.execute(f"UPDATE job SET {column} = replace({column}, ?, ?)", (theirs, ours))  # noqa: S608 - names from the line above
        database.commit()
        database.execute("VACUUM")
    for state in (root / "state").rglob("state-*"):
        state.write_bytes(reidentified(state.read_bytes(), lambda identity: _replaced(identity, paths)))
    for path in root.rglob("*"):
        if path.suffix in (".json", ".html", ".txt") and path.is_file():
            text = path.read_text()
            path.write_text(_replaced_in(text, paths))


def _replaced(identity: dict[str, Any], paths: dict[str, str]) -> dict[str, Any]:
    replaced: dict[str, Any] = json.loads(_replaced_in(json.dumps(identity), paths))
    return replaced


def _replaced_in(text: str, paths: dict[str, str]) -> str:
    for theirs, ours in paths.items():
        text = text.replace(theirs, ours)
    return text


def pack(root: Path, archive: Path) -> None:
    """Pack what a person would find, without who made it."""

    def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return None if Path(entry.name).name in NOT_PACKED else entry

    with tarfile.open(archive, "w:gz") as packed:
        for name in PACKED:
            packed.add(root / name, name, filter=anonymous)


def main() -> None:
    """Make it, beside this script."""
    archive = HERE / f"state-{framepack_core.__version__}.tar.gz"
    if archive.exists():
        sys.exit(f"{archive} is kept for good: move it away to make another")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "place")
        place = Making(root, Path(folder, "own"))
        place.prepare()
        place.config.write_text(_config(place))
        fill(place)
        scrub(root)
        pack(root, archive)
        shutil.rmtree(root)
    print(f"{archive}: {archive.stat().st_size} bytes")


def _config(place: Making) -> str:
    folders = {"inbox": place.inbox, "outbox": place.outbox, "failed": place.failed, "state_dir": place.state}
    lines = "".join(f'{name} = "{folder}"\n' for name, folder in folders.items())
    return f"{lines}settle_seconds = 0.1\nmax_attempts = 1\n{TINY}"


if __name__ == "__main__":
    main()
