"""Finds the results in the outbox and the failed folder for the results page.

It reads the folders, not the database: people move and remove results.
"""

import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from framepackd import files, rights
from framepackd.inbox.listing import IGNORED_FOLDERS
from framepackd.inbox.naming import OF_A_VIDEO
from framepackd.jobs.drafts import ROLE
from framepackd.text import JOB_ID, rest_of_name

log = logging.getLogger(__name__)

FOLDER = ".framepackd"  # in the outbox: hidden, to keep it out of the way of the results
ERROR = ".error.txt"
ROLES, PICTURE = {".txt": "prompt", ".toml": "settings"}, "picture"  # by type; all others are pictures
MAX_RECORD_BYTES, MAX_REASON_BYTES = 1 << 20, 2000


class OtherRecord(BaseModel):
    """How draft and final name each other."""

    id: str | None = None


class ResultRecord(BaseModel):
    """The part of a ``NAME.json`` that the page shows; it is untrusted."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    id: str = Field(pattern=rf"\A{JOB_ID.pattern}\z")
    name: str
    finished_at: AwareDatetime
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    frames: int = Field(gt=0)
    fps: float = Field(gt=0)
    prompt: str = ""
    seed: int | None = None
    draft: bool = False
    final: OtherRecord | None = None  # of a draft
    draft_of: OtherRecord | None = None  # of a final
    steps: int | None = None
    model: str = ""
    device: str | None = None
    quality: str | None = None
    warnings: list[str] = []
    timings: dict[str, float] = {}
    inputs: dict[str, Any] = {}


# By path: what tells a file's versions apart, and its record, if it is one.
RecordsRead = dict[Path, tuple[tuple[int, int], ResultRecord | None]]


@dataclass(frozen=True)
class Result:
    """A video in the outbox, with the files that belong to it; links are relative to the outbox."""

    path: str  # NAME, or NAME_001 where that was taken, with its folder
    record: ResultRecord
    strip: str | None  # link to the picture of its frames
    inputs: tuple[str, ...]  # the dropped files that lie next to it, with the folder

    @property
    def folder(self) -> str:
        """The folder that it lies in; empty for the outbox itself."""
        return self.path.rpartition("/")[0]

    @property
    def picture(self) -> str | None:
        """The link to the picture that it was made from."""
        return next((link for role, link in self.links if role == PICTURE), None)

    @property
    def links(self) -> list[tuple[str, str]]:
        """The kind of each input, and a link to it."""
        return [(ROLES.get(Path(path).suffix.lower(), PICTURE), _link(path)) for path in self.inputs]

    def link(self, suffix: str) -> str:
        """Give the link to one of its files."""
        return _link(self.path + suffix)


@dataclass(frozen=True)
class Failure:
    """A job that failed, with the reason."""

    name: str  # with its folder
    reason: str
    at: datetime


class Outbox:
    """Reads the results in a folder; each version of a record is read once."""

    def __init__(self) -> None:
        """Read nothing yet."""
        self._read: RecordsRead = {}

    def results(self, outbox: Path) -> list[Result]:
        """Find the videos that have their ``NAME.json``, the newest last.

        Raises:
            OSError: the outbox cannot be read.
        """
        strips = {entry.name for entry in _entries(outbox / FOLDER, missing_ok=True)}
        before, self._read = self._read, {}
        found = []
        for folder, names in _folders(outbox):
            for stem in (name.removesuffix(".json") for name in names if name.endswith(".json")):
                record = (
                    self._record(outbox / folder / f"{stem}.json", before) if f"{stem}.mp4" in names else None
                )
                if record is not None:
                    strip = f"{record.id}.jpg"
                    inputs = _inputs(record, folder, stem, names)
                    link = f"{FOLDER}/{strip}" if strip in strips else None
                    found.append(Result(folder + stem, record, link, inputs))
        return sorted(found, key=lambda result: (result.record.finished_at, result.path))

    def _record(self, path: Path, before: RecordsRead) -> ResultRecord | None:
        try:
            status = path.lstat()
            version = (status.st_mtime_ns, status.st_size)
            known = before.get(path)
            if known is None or known[0] != version:
                known = (version, _read_record(path, status))
        except OSError:  # gone meanwhile, or not for us
            return None
        self._read[path] = known
        return known[1]


def failures(failed: Path, limit: int) -> tuple[list[Failure], int]:
    """Give the last failed jobs, the newest first, and how many there are.

    Raises:
        OSError: the folder cannot be read.
    """
    found = []
    for folder, names in _folders(failed):
        for name in names:
            if name.endswith(ERROR):
                path = failed / folder / name
                found.append((_modified(path), path, folder + name.removesuffix(ERROR)))
    found.sort(reverse=True)
    last = [Failure(name, _reason(path), datetime.fromtimestamp(at, UTC)) for at, path, name in found[:limit]]
    return last, len(found)


def keep_strip(strip: Path, outbox: Path, job_id: str) -> None:
    """Copy a video's filmstrip to where the results page looks for it; an error is only logged."""
    try:
        if strip.exists():
            files.make_folder(outbox / FOLDER)
            kept = outbox / FOLDER / f"{job_id}.jpg"
            files.write_bytes(kept, strip.read_bytes())
            rights.share(kept)
    except OSError as error:
        log.warning("job %s: the results page has no picture of it: %s", job_id, error)


def _folders(root: Path) -> Iterator[tuple[str, set[str]]]:
    """Yield the folders below a root, as ``a/b/``, with the names of their files.

    Hidden files, links and recycle bins are left out.
    """
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        names = set()
        for entry in _entries(root / folder, missing_ok=folder != ""):
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False) and not IGNORED_FOLDERS.search(entry.name):
                waiting.append(f"{folder}{entry.name}/")
            elif entry.is_file(follow_symlinks=False):
                names.add(entry.name)
        yield folder, names


def _entries(folder: Path, *, missing_ok: bool) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        if missing_ok:
            return []
        raise


def _inputs(record: ResultRecord, folder: str, stem: str, names: set[str]) -> tuple[str, ...]:
    """Give the dropped files of a video that lie next to it."""
    dropped = []
    for role, entries in record.inputs.items():
        if role in (*OF_A_VIDEO, ROLE):  # delivered as NAME.source.mp4; the record of a draft
            continue
        for entry in entries if isinstance(entries, list) else [entries]:
            file = entry.get("file") if isinstance(entry, dict) else None
            dropped += [stem + rest_of_name(file, record.name)] if isinstance(file, str) else []
    return tuple(folder + name for name in dropped if name in names)


def _link(path: str) -> str:
    """Give a link to a file, with every byte escaped that has a meaning in a URL."""
    return quote(os.fsencode(path))


def _read_record(path: Path, status: os.stat_result) -> ResultRecord | None:
    """Read the ``NAME.json`` of a video; None if the file is something else."""
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_RECORD_BYTES:
        return None
    with files.open_regular(path) as file:
        content = file.read(MAX_RECORD_BYTES)
    try:
        return ResultRecord.model_validate_json(content)
    except ValidationError:
        return None


def _reason(path: Path) -> str:
    """Give the first line of a failed job's ``NAME.error.txt``."""
    try:
        with files.open_regular(path) as file:
            return file.read(MAX_REASON_BYTES).decode("utf-8", "replace").partition("\n")[0]
    except OSError:  # the job runs again
        return ""


def _modified(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0
