"""A job's work folder: what lies in it, and how it is cleared away."""

import contextlib
import os
import re
import shutil
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field, ValidationError

from framepackd import files
from framepackd.jobs import aside
from framepackd.text import JOB_ID

if TYPE_CHECKING:  # with it comes SQLAlchemy, which takes workers and bridges longer than all else of ours
    from framepackd.jobs.job import Job

# Names in a work folder.
MANIFEST = "manifest.json"
INPUTS = "inputs"  # the dropped files
CHECKPOINT = "checkpoint"  # what the worker resumes from
PREVIEW = "preview.mp4"  # the video so far
CONTINUED = "continued"  # the decoded parts of a video that the job extends
VIDEO = ".mp4"  # in RESULT
RESULT = "result"  # what the worker wrote: .mp4 and stills, named by what follows NAME
OUTGOING = "outgoing"  # everything to deliver, under NAME
PLAN = "delivery.json"
MOVING = "moving.json"  # how much of the file that is being moved has been copied
STRIP = f"{files.PART_PREFIX}strip.jpg"  # in RESULT; hidden, so that it is not delivered with the stills

SOURCE = ".source"  # in NAME.source.mp4: the video that was extended
KEPT_DAYS = 7  # for a failed job's checkpoint; checked when a daemon starts
HALF_MADE = re.compile(rf"{re.escape(files.PART_PREFIX)}{JOB_ID.pattern}\.part")
OF_THE_SYSTEM = re.compile(r"lost\+found|@eaDir|\.nfs[0-9a-f]+")  # nobody can move these away
MAX_MANIFEST_BYTES = 16 << 20  # a chain of a thousand frames takes 200 kB


class DamagedFolderError(Exception):
    """A work folder is not as framepackd leaves it; the text follows its name and says what to do."""


def list_work_folders(jobs_dir: Path) -> tuple[list[str], list[Path], list[Path]]:
    """List the names of the work folders, folders half made or half removed, and what is not ours."""
    works, half_made, foreign = [], [], []
    with os.scandir(jobs_dir) as entries:
        for entry in entries:
            ours = entry.is_dir(follow_symlinks=False)
            if ours and JOB_ID.fullmatch(entry.name):
                works.append(entry.name)
            elif ours and HALF_MADE.fullmatch(entry.name):
                half_made.append(Path(entry))
            elif not OF_THE_SYSTEM.fullmatch(entry.name):
                foreign.append(Path(entry))
    return sorted(works), half_made, sorted(foreign)


def remove_empty(work: Path) -> None:
    """Remove a work folder without a manifest. The manifest comes first: no file has been moved yet.

    Raises:
        DamagedFolderError: it holds files all the same.
        OSError: it cannot be removed.
    """
    parts = []
    for path in work.iterdir():
        if path.name.startswith(files.PART_PREFIX) and stat.S_ISREG(path.lstat().st_mode):
            parts.append(path)
        elif path.name != INPUTS or path.is_symlink() or not path.is_dir() or any(path.iterdir()):
            raise DamagedFolderError(
                f"has no {MANIFEST} and belongs to no known job, but is not empty: if you want the files in "
                "it, drop them again; then move the folder away"
            )
    for part in parts:
        part.unlink()
    if (work / INPUTS).exists():
        (work / INPUTS).rmdir()
    work.rmdir()


class DroppedFile(BaseModel, frozen=True):
    """A file of a manifest."""

    path: str = Field(pattern=r"[^/]\z")  # below the inbox
    role: str
    signature: tuple[int, ...]  # when it had settled; empty if it does not come from the inbox
    file: str | None = Field(None, pattern=r"\A[^/]+\z")  # its name in the work folder, if it is another

    @property
    def dropped_name(self) -> str:
        """Its name in the inbox."""
        return self.path.rpartition("/")[2]

    @property
    def taken_name(self) -> str:
        """Its name in the work folder."""
        return self.file or self.dropped_name


class Variation(BaseModel, frozen=True):
    """One of several jobs that a drop becomes."""

    id: str = Field(pattern=rf"\A{JOB_ID.pattern}\z")
    name: str = Field(pattern=r"\A[^/]+\z")
    seed: int


class Manifest(BaseModel, frozen=True):
    """What a work folder was made for, as ``manifest.json`` in it says."""

    folder: str  # below the inbox; empty at its top
    name: str = Field(pattern=r"\A[^/]+\z")
    defaults: tuple[str, ...]  # paths of the _defaults.toml files that hold for it, outermost first
    inbox: int | None = None  # the inode of the inbox that the files are taken from
    files: tuple[DroppedFile, ...] = Field(min_length=1)
    seed: int | None = None  # of a variation, or of a job that runs again
    variations: tuple[Variation, ...] = ()  # the jobs that it is to become, if several

    def write(self, work: Path) -> None:
        """Write it into a work folder, durable when this returns."""
        files.write_json(work / MANIFEST, self.model_dump(mode="json", exclude_defaults=True))


def read_manifest(work: Path) -> Manifest:
    """Read what a work folder was made for.

    Raises:
        DamagedFolderError: it cannot have been written by framepackd.
        OSError: it cannot be read.
    """
    inputs = work / INPUTS
    try:
        with files.open_regular(work / MANIFEST) as file:
            content = file.read(MAX_MANIFEST_BYTES)
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise DamagedFolderError(
            f"has a {MANIFEST} that is damaged: its files lie in {inputs}, or still in the inbox, hidden as "
            f"{files.PART_PREFIX}{work.name}-….part: drop them again, and move the folder away"
        ) from error
    if inputs.is_symlink():
        raise DamagedFolderError(f"has a symbolic link for {INPUTS}: move the folder away")
    return manifest


def clear_work_folder(work: Path, *, failed: bool) -> None:
    """Remove an ended job's folder; that of a failed job keeps for some days what a retry resumes from."""
    if work.is_symlink():
        return  # not made by framepackd: adopt_leftovers reports it
    with contextlib.suppress(FileNotFoundError):  # another thread clears it too
        kept = [path for path in (work / CHECKPOINT, *aside.places(work / CHECKPOINT)) if path.exists()]
        if not failed or all(_days_since(checkpoint) > KEPT_DAYS for checkpoint in kept):
            shutil.rmtree(work)
            return
        for path in work.iterdir():
            if path in kept:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _days_since(path: Path) -> float:
    """Say how long ago anything was written to a checkpoint; a chain's has a folder for each clip."""
    latest = max(each.stat().st_mtime for each in (path, *path.iterdir()))
    return (time.time() - latest) / 86400


def where(job: "Job") -> tuple[str, str]:
    """Give the folder (below the outbox or failed folder) and the NAME under which a job was delivered."""
    folder, _, stem = (job.stem or job.name).rpartition("/")
    return folder or job.folder, stem


def forget(work: Path) -> None:
    """Discard the plan of a job's last delivery: the job is to run again."""
    (work / PLAN).unlink(missing_ok=True)
    if (work / OUTGOING).exists():
        shutil.rmtree(work / OUTGOING)
    files.sync_folder(work)
