"""From settled files in the inbox to a job: take the files, check them, record the job.

Order matters: a manifest says what is to be taken; the files get hidden names in their folder, and are nobody
else's any more; they are copied, because others may hold a link to one or have it open; the hidden ones are
removed; the row is written. What a crash leaves in between is finished at the next start.
"""

import json
import logging
import secrets
import shutil
import time
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from framepack_core.buckets import Size
from framepackd import aside, files, variations
from framepackd.config import Config
from framepackd.database import ENDED, Job, State, utc_now
from framepackd.groups import Group
from framepackd.jobs import JobStore
from framepackd.listing import Signature
from framepackd.names import taken_name
from framepackd.resolving import resolve

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
INPUTS = "inputs"
CHECKPOINT = "checkpoint"  # what the worker goes on from
PREVIEW = "preview.mp4"  # what exists of the video
CONTINUED = "continued"  # what is made ready of a video that the job goes on with
KEPT_DAYS = 7  # a failed job's checkpoint, counted at the start of a daemon


class ChangedError(OSError):
    """A file is not any more what had settled."""


def take(group: Group, config: Config, store: JobStore) -> list[Job]:
    """Take a settled group out of the inbox and record its job, or those of its variations.

    A mistake in the files makes a job that fails with the reason.

    Raises:
        ChangedError: a file has changed since it had settled; nothing is touched.
        OSError: the files cannot be moved; they are where they were.
    """
    for path, settled in group.signatures.items():
        if _signature(config.inbox / path) != list(settled):
            raise ChangedError(path)
    roles = {path: role for role in group.files for path in group.files[role]}
    manifest = {
        "folder": group.folder,
        "name": group.name,
        "defaults": group.defaults,
        "files": [
            {"path": path, "role": roles[path], "signature": list(group.signatures[path])}
            | _name_of_keyframe(group.name, path, roles[path])
            for path in group.paths
        ],
    }
    work = config.jobs_dir / _new_id()
    (work / INPUTS).mkdir(parents=True)
    files.write_json(work / MANIFEST, manifest)
    files.sync_folder(config.jobs_dir)
    try:
        _bring_in(work, manifest, config.inbox)
        return _record(work, manifest, config, store)
    except OSError:
        if "variations" in manifest:
            variations.undo(work, manifest, file=MANIFEST)
        _put_back(work, manifest, config.inbox)
        raise


def _name_of_keyframe(name: str, path: str, role: str) -> dict[str, str]:
    """Have a keyframe travel under NAME, whatever it was called."""
    kind, _, number = role.partition("-")
    return {"file": f"{name}_section_{number}{Path(path).suffix}"} if kind == "keyframe" else {}


def adopt_leftovers(config: Config, store: JobStore) -> list[Job]:
    """Finish, at start-up, what a crash interrupted between the inbox and the database, or at a job's end."""
    known = store.states()
    adopted: list[Job] = []
    sizes: dict[str, Size] = {}
    for work in sorted(path for path in config.jobs_dir.iterdir() if path.is_dir()):
        manifest_file = work / MANIFEST
        if known.get(work.name) in ENDED:
            clear_work_folder(work, State(known[work.name]))
        elif work.name not in known and not manifest_file.exists():
            shutil.rmtree(work)  # the manifest comes first: nothing had been moved
        if work.name in known or not work.exists():
            continue
        try:
            manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
            try:
                if "variations" not in manifest:
                    _bring_in(work, manifest, config.inbox)
            except ChangedError:
                _put_back(work, manifest, config.inbox)
                continue
            jobs = _record(work, manifest, config, store, known, sizes)
        except OSError as error:
            log.error(  # noqa: TRY400 - the text says all
                "job %s: its intake cannot be finished: %s: trying again at the next start", work.name, error
            )
            continue
        for job in jobs:
            log.info("job %s: taken in after a crash during its intake", job.id)
        adopted += jobs
        known |= {job.id: job.state for job in jobs}
    return adopted


def clear_work_folder(work: Path, state: State) -> None:
    """Remove an ended job's folder; a failed one keeps for some days what a retry goes on from."""
    kept = [path for path in (work / CHECKPOINT, *aside.places(work / CHECKPOINT)) if path.exists()]
    if state is not State.FAILED or all(_days_since(checkpoint) > KEPT_DAYS for checkpoint in kept):
        shutil.rmtree(work)
        return
    for path in work.iterdir():
        if path.is_dir() and path not in kept:
            shutil.rmtree(path)
        elif path not in kept:
            path.unlink()


def _days_since(path: Path) -> float:
    """Say how long ago anything was written to a folder; a chain has one for each clip in it."""
    latest = max(each.stat().st_mtime for each in (path, *path.iterdir()))
    return (time.time() - latest) / 86400


def _new_id() -> str:
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def _signature(path: Path) -> list[int] | None:
    """Tell a file from others by that name; None if there is none."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return list(Signature(status.st_size, status.st_mtime_ns, status.st_ino))


def _dropped_name(entry: dict[str, Any]) -> str:
    return Path(entry["path"]).name


def _claimed(folder: Path, work: Path, entry: dict[str, Any]) -> Path:
    """Give the hidden name that a file has in its folder while it is taken in."""
    return folder / f"{files.PART_PREFIX}{work.name}-{_dropped_name(entry)}.part"


def _bring_in(work: Path, manifest: dict[str, Any], inbox: Path) -> None:
    """Copy what the manifest names to the work folder and remove it from the inbox; goes on after a crash.

    Raises:
        ChangedError: a file is not any more what had settled; none has been removed.
    """
    inputs = work / INPUTS
    try:
        with files.folder_below(inbox, manifest["folder"]) as folder:
            _claim(folder, work, manifest)
            for entry in manifest["files"]:
                _copy(_claimed(folder, work, entry), inputs / taken_name(entry), entry)
            files.sync_folder(inputs)
            for entry in manifest["files"]:
                _claimed(folder, work, entry).unlink(missing_ok=True)
            files.sync_folder(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        # The folder is gone; which is as it should be if all was taken before a crash.
        if not all((inputs / taken_name(entry)).exists() for entry in manifest["files"]):
            raise ChangedError(manifest["folder"]) from error


def _claim(folder: Path, work: Path, manifest: dict[str, Any]) -> None:
    for entry in manifest["files"]:
        source, claimed = folder / _dropped_name(entry), _claimed(folder, work, entry)
        copied = (work / INPUTS / taken_name(entry)).exists()
        if _signature(claimed) is None and (not copied or _signature(source) == entry["signature"]):
            source.rename(claimed)
        if not copied and _signature(claimed) != entry["signature"]:
            raise ChangedError(entry["path"])


def _copy(claimed: Path, target: Path, entry: dict[str, Any]) -> None:
    if target.exists():
        return  # before a crash
    part = target.with_name(f"{files.PART_PREFIX}{target.name}.part")
    files.copy(claimed, part)
    if _signature(claimed) != entry["signature"]:
        raise ChangedError(entry["path"])  # somebody wrote to it meanwhile
    part.rename(target)


def _put_back(work: Path, manifest: dict[str, Any], inbox: Path) -> None:
    """Undo it: every file gets its name in the inbox again, and the work folder goes."""
    copies = {path.name: path for path in (work / INPUTS).glob("[!.]*")}
    try:
        with files.folder_below(inbox, manifest["folder"]) as folder:
            for entry in manifest["files"]:
                source, claimed = folder / _dropped_name(entry), _claimed(folder, work, entry)
                copy = copies.get(taken_name(entry))
                if _signature(claimed) is not None:
                    files.rename_to_free_name(claimed, source)
                elif copy is not None and _signature(source) is None:  # the copy is all there is
                    files.move(copy, source, part=f"back-{work.name}-{source.name}")
            files.sync_folder(folder)
    except (FileNotFoundError, NotADirectoryError):
        if copies:
            raise
    shutil.rmtree(work)


def _record(
    work: Path,
    manifest: dict[str, Any],
    config: Config,
    store: JobStore,
    known: Collection[str] = (),
    sizes: dict[str, Size] | None = None,
) -> list[Job]:
    """Check what was taken and write the job's row, or those of its variations, except what is known.

    Raises:
        OSError: there is no room for the variations; no row is written.
    """
    sizes = {} if sizes is None else sizes
    if "variations" not in manifest:
        job = _new_job(work, manifest)
        settings = resolve(job, work / INPUTS, manifest, config, store, sizes)
        if job.delivery is not None or settings is None or settings.seeds == 1:
            return [_add(job, store)]
        seeds = variations.choose_seeds(settings.seed, settings.seeds)
        manifest |= variations.plan(manifest, seeds, [_new_id() for _ in seeds])
        files.write_json(work / MANIFEST, manifest)
    variations.spread(work, manifest, known, inputs=INPUTS, file=MANIFEST)
    jobs = []
    for variation in manifest["variations"]:
        if variation["id"] not in known:
            folder = config.jobs_dir / variation["id"]
            own = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            job = _new_job(folder, own)
            resolve(job, folder / INPUTS, own, config, store, sizes)
            jobs.append(_add(job, store))
    return jobs


def _new_job(work: Path, manifest: dict[str, Any]) -> Job:
    return Job(
        id=work.name,
        name=manifest["name"],
        folder=manifest["folder"],
        state=State.QUEUED,
        created_at=utc_now(),
    )


def _add(job: Job, store: JobStore) -> Job:
    log.info("job %s: %s taken in: %s", job.id, job.path, (job.delivery or {}).get("error") or _summary(job))
    return store.add(job)


def _summary(job: Job) -> str:
    return f"{job.frames} frames ({job.frames / 30:.2f} s), {job.width}x{job.height}"
