"""Brings a failed or cancelled job back for a retry: its files return from the failed folder.

First the database records that the job is queued and its files are on their way, then they are moved. As with
a delivery, the next daemon or command finishes what a crash leaves in between.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from framepackd import files
from framepackd.files import moving
from framepackd.inbox.naming import OF_A_VIDEO, defaults_above, defaults_by_folder, folders_above, is_defaults
from framepackd.intake.resolve import resolve
from framepackd.jobs import folder as work_folder
from framepackd.jobs.folder import INPUTS, DroppedFile, Manifest
from framepackd.jobs.job import Job, State
from framepackd.jobs.store import JobStore
from framepackd.settings.config import Config
from framepackd.text import rest_of_name

log = logging.getLogger(__name__)


def obstacle(job: Job, config: Config) -> str | None:
    """Say why an ended job's files cannot be brought back; None if they can.

    They must be unchanged, since the job runs again as recorded. Only a job that failed the checks of its
    files is checked again, and its files may have been corrected.
    """
    if not job.inputs:
        return "its files were never read: drop them into the inbox again"
    for source, _, sha256 in _moves(job, config):
        if source.is_symlink() or not source.is_file():
            return f"{source} is missing, or no file: bring it back, or drop the files into the inbox again"
        if sha256 is not None and files.sha256(source) != sha256:
            return f"{source} has changed since: drop the files into the inbox again, as a new job"
    return None


def bring_back(
    job: Job,
    config: Config,
    store: JobStore,
    *,
    progress: moving.Progress | None = None,
) -> None:
    """Move the files of a job that is to run again into its work folder, and let it be claimed.

    Raises:
        StoppedError: ``progress.stop`` said so; the next call resumes.
        OSError: they cannot be moved; nothing is lost, try again later.
    """
    work = config.jobs_dir / job.id
    (work / INPUTS).mkdir(parents=True, exist_ok=True)
    work_folder.forget(work)
    files.sync_folder(config.jobs_dir)
    manifest = _manifest(job, config)
    manifest.write(work)
    for source, target, _ in _moves(job, config):
        if source.exists() and target.exists() and target.stat().st_size == 0:
            target.unlink()  # reserved for it before a crash
        part, note = f"retry-{target.name}", work / work_folder.MOVING
        with contextlib.suppress(FileExistsError):  # moved before a crash: the source is another file
            moving.move(source, target, part=part, note=note, progress=progress)
    _remove_reason(job, config)
    job.delivery = None
    if not job.settings:
        resolved = resolve(work, manifest, config, store)
        for column, value in resolved.columns().items():
            setattr(job, column, value)
        if resolved.seeds > 1:
            error = (
                f"seeds = {resolved.seeds} asks for several jobs, and a retry is of one: drop the files again"
            )
            job.settings, job.delivery = {}, {"state": State.FAILED, "error": error}
    elif (problem := _damage(job, config)) is not None:
        job.delivery = {"state": State.FAILED, "error": problem}
    store.brought_back(job)
    failed = job.delivery["error"] if job.delivery else None
    level = logging.WARNING if failed else logging.INFO
    log.log(level, "job %s: %s: %s", job.id, job.path, failed or "in the queue again")


def _moves(job: Job, config: Config) -> Iterator[tuple[Path, Path, str | None]]:
    """Give for each file where it was delivered, where it goes, and its SHA-256 if it must be unchanged."""
    folder, stem = work_folder.where(job)
    for role, entry in job.inputs.items():
        rest = rest_of_name(entry["file"], job.name)
        source = config.failed / folder / f"{stem}{rest}"
        renamed = source.with_name(f"{stem}{work_folder.SOURCE}{rest}")
        if role in OF_A_VIDEO and renamed.exists():
            source = renamed
        target = config.jobs_dir / job.id / INPUTS / entry["file"]
        yield source, target, entry["sha256"] if job.settings else None  # settings: its files were checked


def _manifest(job: Job, config: Config) -> Manifest:
    """Make the manifest that intake would make: with it the job is not lost even without the database."""
    prefix = f"{job.folder}/" if job.folder else ""
    return Manifest(
        folder=job.folder,
        name=job.name,
        defaults=() if job.settings else tuple(defaults_of(job, config)),
        files=tuple(
            DroppedFile(path=prefix + entry["file"], role=role, signature=())
            for role, entry in job.inputs.items()
        ),
        seed=job.settings["seed"] if job.settings else None,
    )


def defaults_of(job: Job, config: Config) -> list[str]:
    """Find the ``_defaults.toml`` files that hold for a job now, without scanning the inbox."""
    found: list[str] = []
    for above in folders_above(job.folder):
        with (
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            files.folder_below(config.inbox, above) as opened,
        ):
            names = (path.name for path in opened.iterdir())
            found += [f"{above}/{name}".lstrip("/") for name in names if is_defaults(name)]
    return defaults_above(job.folder, defaults_by_folder(found))


def _remove_reason(job: Job, config: Config) -> None:
    """Remove the text that says why the job had ended, if it is about this job."""
    folder, stem = work_folder.where(job)
    for reason in ("error", "cancelled"):
        path = config.failed / folder / f"{stem}.{reason}.txt"
        if path.is_file() and f"(job {job.id})" in path.read_text(encoding="utf-8", errors="replace"):
            path.unlink()


def _damage(job: Job, config: Config) -> str | None:
    """Check the files again in the work folder, where nobody else changes them."""
    for _, target, sha256 in _moves(job, config):
        if not target.exists():
            return f"{target.name} disappeared while it was brought back: drop the files again"
        if files.sha256(target) != sha256:
            return f"{target.name} changed while it was brought back: drop the files again"
    return None
