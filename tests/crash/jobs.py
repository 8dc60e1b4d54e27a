"""The mixed queue: nine drops that take every way through the daemon, and what must have become of them."""

import hashlib
import json
import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from framepackd.delivery.results import FOLDER
from framepackd.delivery.results_page import INDEX
from framepackd.folders import MARKER
from tests.acceptance.conftest import TINY, picture
from tests.golden import TINY_MODELS

# By name: settings of the job, on the demo model if none is named. Each has two sections, or clips of two.
JOBS: dict[str, dict[str, Any]] = {
    "plain": {"steps": 3},
    "end": {"steps": 2, "save_section_frames": True},
    "chain": {"steps": 2, "save_section_frames": True},
    "many": {"steps": 2, "seeds": 2, "seed": 5},
    "guided": {
        "model": "tiny",
        "steps": 2,
        "true_cfg_scale": 2.0,
        "negative_prompt": "blurry",
        "guidance_rescale": 0.3,
    },
    "cached": {"model": "tiny", "steps": 8, "cache": "teacache", "save_section_frames": True},
    "forward": {"steps": 3, "model": "tiny-f1", "save_section_frames": True},
    "forward-cached": {"steps": 8, "model": "tiny-f1", "cache": "teacache"},
    "wrong": {"steps": 0},
}
FAILING = ("wrong",)
IN_A_BATCH: dict[str, Any] = {"steps": 1}  # of one of hundreds of jobs


def settings_of(name: str) -> dict[str, Any]:
    """Give the settings of a job by its name, or that of a variation of it."""
    return JOBS.get(name.partition("_")[0], IN_A_BATCH)


def batch_of(number: int) -> tuple[str, ...]:
    """Name a queue of so many jobs: the mixed ones, and as many more of one kind."""
    return (*JOBS, *(f"batch{each:04}" for each in range(number - len(JOBS))))


CHAIN_FRAMES = 3
WAITING = "waiting"
MODELS = f"""
[models.tiny]
kind = "framepack"
transformer = "{TINY_MODELS}/framepack-i2v"
base = "{TINY_MODELS}/hunyuanvideo"
image_encoder = "{TINY_MODELS}/flux_redux"
[models.tiny-f1]
kind = "f1"
transformer = "{TINY_MODELS}/framepack-f1"
base = "{TINY_MODELS}/hunyuanvideo"
image_encoder = "{TINY_MODELS}/flux_redux"
"""


@dataclass(frozen=True)
class Folders:
    """Where a daemon works; ``root`` may be a mount, ``own`` keeps what is not part of the experiment."""

    root: Path
    own: Path
    jobs: tuple[str, ...] = tuple(JOBS)  # of which the queue is made
    states: Path | None = None  # where the state folder is, if not below the root
    targets: Path | None = None  # where outbox and failed folder are, if not below the root
    devices: int = 1  # workers; with several of them they are killed too, which counts as attempts
    waiting: int = 0  # texts in the inbox whose pictures never come

    @property
    def expected_jobs(self) -> list[str]:
        """What the drops become: one job each, or one for each seed."""
        counts = {name: settings_of(name).get("seeds", 1) for name in self.jobs}
        return [
            name if count == 1 else f"{name}_seed_{settings_of(name)['seed'] + number}"
            for name, count in counts.items()
            for number in range(count)
        ]

    @property
    def inbox(self) -> Path:
        return self.root / "inbox"

    @property
    def dropped(self) -> list[str]:
        """What lies in the inbox and does not wait for ever."""
        return [path.name for path in self.inbox.iterdir() if not path.name.startswith(WAITING)]

    @property
    def outbox(self) -> Path:
        return (self.targets or self.root) / "outbox"

    @property
    def failed(self) -> Path:
        return (self.targets or self.root) / "failed"

    @property
    def state(self) -> Path:
        return (self.states or self.root) / "state"

    @property
    def config(self) -> Path:
        return self.own / "config.toml"

    def prepare(self, extra: str = "") -> None:
        """Write the config and make the folders, empty."""
        self.own.mkdir(parents=True, exist_ok=True)
        for folder in (self.inbox, self.outbox, self.failed, self.state):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        for number in range(self.waiting):
            (self.inbox / f"{WAITING}{number:05}.txt").write_text("its picture never comes")
        names = {"inbox": self.inbox, "outbox": self.outbox, "failed": self.failed, "state_dir": self.state}
        lines = "".join(f'{name} = "{folder}"\n' for name, folder in names.items())
        several = f"[gpu]\ndevice = {json.dumps(['cpu'] * self.devices)}\n" if self.devices > 1 else ""
        extra += "max_attempts = 100\n" if self.devices > 1 else ""
        self.config.write_text(
            f"{lines}settle_seconds = 0.1\n{extra}{TINY}keep_latents = true\n{several}{MODELS}"
        )


def drop(folders: Folders, name: str) -> None:
    """Drop a job's files into the inbox."""
    seed = list(JOBS).index(name) if name in JOBS else 300 + int(name.removeprefix("batch"))
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings_of(name).items()]
    (folders.inbox / f"{name}.toml").write_text("".join(lines))
    (folders.inbox / f"{name}.txt").write_text(f"a lake, {name}")
    if name == "end":
        picture(folders.inbox / f"{name}.end.png", seed=100 + seed)
    if name == "chain":
        for number in range(CHAIN_FRAMES):
            picture(folders.inbox / f"{name}_frame_{number}.png", seed=200 + number)
    else:
        picture(folders.inbox / f"{name}.png", seed=seed)


def hashes(folder: Path) -> dict[str, str]:
    """Give the SHA-256 of every file in a folder; not of the results page, which tells the time and ids."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name not in (INDEX, FOLDER, MARKER)
    }


@dataclass
class Outcome:
    """What became of the jobs of one queue or, added up, of several."""

    jobs: int = 0
    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    repeated: int = 0  # sampling steps that were run more often than needed
    repeated_cached: int = 0  # of them, of jobs with a step cache
    other: list[str] = field(default_factory=list)  # whatever else is not as it should be

    def __iadd__(self, more: "Outcome") -> "Outcome":
        """Add those of another queue."""
        for name, value in vars(more).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    @property
    def clean(self) -> bool:
        """Whether nothing was lost, made twice, or made differently."""
        return not (self.lost or self.duplicated or self.differing or self.other)


def seen_too_early(folders: Folders, expected: dict[str, str]) -> list[str]:
    """Name what can be seen in the outbox, at any moment, without being whole."""
    wrong = []
    seen = hashes(folders.outbox)
    page = folders.outbox / INDEX
    if page.exists() and not page.read_text().endswith("</html>\n"):
        wrong.append(f"{page.name} is not whole")
    for name in expected.keys() - seen.keys():
        video = f"{name.partition('.')[0]}.mp4"
        if video in seen and video in expected:
            wrong.append(f"{name} is not there, but {video} is, which comes last")
    for name, sha in seen.items():
        if name.startswith("."):
            continue  # hidden, on its way
        if name.endswith(".json"):
            try:
                json.loads((folders.outbox / name).read_text())
            except ValueError:
                wrong.append(f"{name} is not whole")
        elif sha != expected.get(name):
            wrong.append(f"{name} is not what it should be")
    return wrong


def unfinished(folders: Folders) -> bool:
    """Say whether something is left to do."""
    if folders.dropped:
        return True
    with closing(sqlite3.connect(folders.state / "framepackd.db")) as connection:
        ended = connection.execute("SELECT count(*) FROM job WHERE state IN ('done', 'failed')").fetchone()
    return int(ended[0]) < len(folders.expected_jobs)


def examine(folders: Folders, expected: dict[str, str]) -> Outcome:
    """Look at everything that a finished queue has left."""
    outcome = Outcome(jobs=len(folders.expected_jobs))
    rows = _rows(folders.state / "framepackd.db", outcome)
    ended = Counter(row["name"] for row in rows if row["state"] in ("done", "failed"))
    delivered, refused = hashes(folders.outbox), hashes(folders.failed)
    for name in folders.expected_jobs:
        if name in FAILING:
            files = [other for other in refused if other.startswith(name) and other.endswith(".error.txt")]
        else:
            files = [other for other in delivered if other.startswith(name) and _is_video_of(other, name)]
        if not files or not ended[name]:
            outcome.lost.append(f"{name}: {files or 'no files'}, {ended[name]} in the database")
        if len(files) > 1 or ended[name] > 1:
            outcome.duplicated.append(f"{name}: {files}, {ended[name]} in the database")
    for row in rows:
        if row["attempts"] and folders.devices == 1:
            outcome.other.append(f"{row['name']}: {row['attempts']} attempts counted: {row['history']}")
        if row["state"] != ("failed" if row["name"] in FAILING else "done"):
            outcome.other.append(f"{row['name']} is {row['state']}: {row['error']}")
        extra = max(row["steps_run"] - row["steps_total"], 0)
        outcome.repeated += extra
        outcome.repeated_cached += extra if settings_of(row["name"]).get("cache") else 0
        if row["steps_run"] < row["steps_total"]:
            outcome.other.append(f"{row['name']}: {row['steps_run']} of {row['steps_total']} steps counted")
    found = {name: sha for name, sha in (delivered | refused).items() if not _tells_time(name)}
    for name, sha in expected.items():
        if found.pop(name, None) != sha:
            outcome.differing.append(name)
    outcome.other += [f"{name} is left over or too many" for name in found]
    jobs_dir = folders.state / "jobs"
    left = (*(path.name for path in jobs_dir.iterdir()), *folders.dropped)
    outcome.other += [f"{name} is left over" for name in left]
    waiting = len(list(folders.inbox.iterdir())) - len(folders.dropped)
    if waiting != folders.waiting:
        outcome.other.append(f"{waiting} of {folders.waiting} texts without pictures wait")
    for path in folders.outbox.glob("*.json"):
        record = json.loads(path.read_text())
        if record["state"] != "done":
            outcome.other.append(f"{path.name} says {record['state']}")
    return outcome


def expected_of(folders: Folders) -> dict[str, str]:
    """Give what an undisturbed daemon has delivered; without what tells the time or the id of a job."""
    made = hashes(folders.outbox) | hashes(folders.failed)
    return {name: sha for name, sha in made.items() if not _tells_time(name)}


def _tells_time(name: str) -> bool:
    return name.endswith((".json", ".error.txt"))


def _is_video_of(file: str, name: str) -> bool:
    """Tell forward_001.mp4, of forward, from forward-cached.mp4."""
    rest = file.removeprefix(name)
    return rest.endswith(".mp4") and (rest == ".mp4" or rest.startswith("_"))


def _rows(database: Path, outcome: Outcome) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(database)) as connection:
        connection.row_factory = sqlite3.Row
        integrity = connection.execute("PRAGMA integrity_check").fetchone()[0]
        if integrity != "ok":
            outcome.other.append(f"the database: {integrity}")
        return [dict(row) for row in connection.execute("SELECT * FROM job")]
