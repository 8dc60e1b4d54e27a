"""From settled files in the inbox to a job: take the files, check them, record the job.

Order matters: a manifest says what is to be taken; the files get hidden names in their folder, and are nobody
else's any more; they are copied, because others may hold a link to one or have it open; the hidden ones are
removed; the row is written. What a crash leaves in between is finished at the next start.
"""

import contextlib
import errno
import json
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Collection
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from framepack_core.buckets import Size
from framepackd import files, moving, variations
from framepackd.config import Config
from framepackd.database import ENDED, Job, State, StoreError, utc_now
from framepackd.groups import Group
from framepackd.jobs import JobStore
from framepackd.listing import Signature
from framepackd.names import printable, taken_name
from framepackd.problems import Problem
from framepackd.resolving import resolve
from framepackd.work_folder import (
    INPUTS,
    MANIFEST,
    DamagedError,
    clear_work_folder,
    list_work_folders,
    read_manifest,
    remove_empty,
)

log = logging.getLogger(__name__)

TOLD_FOREIGN = 5  # things that are not ours, one by one

# One at a time: what is just being taken in looks like what a crash has left.
_taking = threading.Lock()


class ChangedError(OSError):
    """A file is not any more what had settled."""


class HalfTakenError(OSError):
    """Files that were being taken in are neither in the inbox nor in the work folder; the text says more."""


class Leftovers(NamedTuple):
    """What ``adopt_leftovers`` recorded, and what it could not finish or must not touch."""

    jobs: list[Job]
    problems: list[Problem]


def take(group: Group, config: Config, store: JobStore) -> list[Job]:
    """Take a settled group out of the inbox and record its job, or those of its variations.

    A mistake in the files makes a job that fails with the reason.

    Raises:
        ChangedError: a file has changed since it had settled; nothing is touched.
        HalfTakenError: it can neither be done nor undone, for now: ``adopt_leftovers`` does either later.
        OSError: the files cannot be moved; they are where they were.
    """
    with _taking:
        for path, settled in group.signatures.items():
            if _signature(config.inbox / path) != list(settled):
                raise ChangedError(path)
        work = config.jobs_dir / _new_id()
        manifest = _manifest(group, config.inbox)
        _begin(work, manifest)
        try:
            _bring_in(work, manifest, config.inbox)
            return _record(work, manifest, config, store)
        except OSError:
            _undo(work, manifest, config.inbox)
            raise


def _undo(work: Path, manifest: dict[str, Any], inbox: Path) -> None:
    """Put everything back.

    Raises:
        HalfTakenError: it cannot be done now, and the work folder stays.
    """
    try:
        if "variations" in manifest:
            variations.undo(work, manifest, file=MANIFEST)
        _put_back(work, manifest, inbox)
    except HalfTakenError:
        raise
    except OSError as error:
        reason = (
            f"is half taken in: its files can be neither taken nor put back ({error.strerror}): tried again"
        )
        raise HalfTakenError(errno.EIO, reason) from error


def _manifest(group: Group, inbox: Path) -> dict[str, Any]:
    """Say what is to be taken, as what, and from which inbox."""
    roles = {path: role for role in group.files for path in group.files[role]}
    return {
        "folder": group.folder,
        "name": group.name,
        "defaults": group.defaults,
        "inbox": inbox.stat().st_ino,  # tells it from the empty folder that its share is mounted on
        "files": [
            {"path": path, "role": roles[path], "signature": list(group.signatures[path])}
            | _name_of_keyframe(group.name, path, roles[path])
            for path in group.paths
        ],
    }


def _begin(work: Path, manifest: dict[str, Any]) -> None:
    """Make a work folder with its manifest."""
    try:
        (work / INPUTS).mkdir(parents=True)
        files.write_json(work / MANIFEST, manifest)
        files.sync_folder(work.parent)
    except OSError:
        with contextlib.suppress(OSError, DamagedError):
            remove_empty(work)  # a full disk: there would be one more at each try
        raise


def _name_of_keyframe(name: str, path: str, role: str) -> dict[str, str]:
    """Have a keyframe travel under NAME, whatever it was called."""
    kind, _, number = role.partition("-")
    return {"file": f"{name}_section_{number}{Path(path).suffix}"} if kind == "keyframe" else {}


def adopt_leftovers(config: Config, store: JobStore) -> Leftovers:
    """Finish what was interrupted between the inbox and the database.

    Can be repeated at any time. What cannot be finished, and what is not ours, stays as it is and is told.

    Raises:
        StoreError: the database cannot be used.
        OSError: the work folders cannot be listed.
    """
    with _taking:
        # Listed before the database is asked: what was recorded meanwhile is known then.
        names, half_made, foreign = list_work_folders(config.jobs_dir)
        known = store.states()
        left = Leftovers([], _told_of_foreign(foreign))
        sizes: dict[str, Size] = {}
        for hidden in half_made:
            shutil.rmtree(hidden, ignore_errors=True)
        for work in (config.jobs_dir / name for name in names if name not in known):
            try:
                jobs = _finish(work, config, store, known, sizes)
            except StoreError:
                raise
            except Exception as error:  # one odd folder must not hide the jobs behind it
                left.problems.append(Problem("intake", printable(_told_of_work_folder(work, error))))
                continue
            for job in jobs:
                log.info("job %s: taken in after a crash during its intake", job.id)
            left.jobs.extend(jobs)
            known |= {job.id: job.state for job in jobs}
        return left


def clear_ended(config: Config, store: JobStore) -> None:
    """Remove what was left of jobs at their end; only at a start, before any files move.

    Raises:
        StoreError: the database cannot be used.
        OSError: the work folders cannot be listed.
    """
    names, _, _ = list_work_folders(config.jobs_dir)
    known = store.states()
    for name in names:
        if known.get(name) in ENDED:
            try:
                clear_work_folder(config.jobs_dir / name, State(known[name]))
            except OSError as error:
                log.warning("job %s: what is left of it cannot be removed: %s", name, error)


def _told_of_foreign(foreign: list[Path]) -> list[Problem]:
    told = [f"{path} is not framepackd's: move it away" for path in foreign[:TOLD_FOREIGN]]
    if len(foreign) > TOLD_FOREIGN:
        rest = len(foreign) - TOLD_FOREIGN
        told.append(f"{foreign[0].parent} holds {rest} more that are not framepackd's: move them away")
    return [Problem("foreign", printable(text)) for text in told]


def _told_of_work_folder(work: Path, error: Exception) -> str:
    if isinstance(error, DamagedError | HalfTakenError):
        return f"{work} {error.args[-1]}"
    if not isinstance(error, OSError):
        log.error("job %s", work.name, exc_info=error)
        return f"{work}: an error of framepackd's own ({type(error).__name__}: {error}): please report it"
    where = f": {error.filename}" if error.filename else ""
    return (
        f"{work} is of a job whose intake or end cannot be finished ({error.strerror}{where}): put that "
        "right, and it goes on by itself"
    )


def _finish(
    work: Path, config: Config, store: JobStore, known: dict[str, str], sizes: dict[str, Size]
) -> list[Job]:
    """Finish what was interrupted in one work folder, and give the jobs that are recorded now.

    Raises:
        DamagedError: it is not as framepackd leaves a folder.
        OSError: it cannot be finished, for now.
    """
    if work.name in known:  # a variation's, recorded a moment ago
        return []
    if not os.path.lexists(work / MANIFEST):
        remove_empty(work)
        return []
    manifest = read_manifest(work)
    if "variations" not in manifest:
        try:
            _bring_in(work, manifest, config.inbox)
        except ChangedError:
            _put_back(work, manifest, config.inbox)
            return []
    return _record(work, manifest, config, store, known, sizes)


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


def _back(folder: Path, work: Path, entry: dict[str, Any]) -> Path:
    """Give the hidden name that a copy has in the inbox while it is moved back."""
    return folder / f"{files.PART_PREFIX}{_back_part(work, entry)}.part"


def _back_part(work: Path, entry: dict[str, Any]) -> str:
    return f"back-{work.name}-{_dropped_name(entry)}"


def _copy_of(work: Path, entry: dict[str, Any]) -> Path:
    return work / INPUTS / taken_name(entry)


def _bring_in(work: Path, manifest: dict[str, Any], inbox: Path) -> None:
    """Copy what the manifest names to the work folder and remove it from the inbox; goes on after a crash.

    Raises:
        ChangedError: a file is not any more what had settled; none has been removed.
    """
    try:
        with files.folder_below(inbox, manifest["folder"]) as folder:
            _claim(folder, work, manifest)
            for entry in manifest["files"]:
                _copy(_claimed(folder, work, entry), _copy_of(work, entry), entry)
            files.sync_folder(work / INPUTS)
            for entry in manifest["files"]:
                _claimed(folder, work, entry).unlink(missing_ok=True)
                _back(folder, work, entry).unlink(missing_ok=True)  # it was on its way back when a crash came
            files.sync_folder(folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        # The folder is gone; which is as it should be if all was taken before a crash.
        if not all(_copy_of(work, entry).exists() for entry in manifest["files"]):
            raise ChangedError(manifest["folder"]) from error


def _claim(folder: Path, work: Path, manifest: dict[str, Any]) -> None:
    for entry in manifest["files"]:  # all are looked at before one is renamed
        there = _signature(_claimed(folder, work, entry)) or _signature(folder / _dropped_name(entry))
        if not _copy_of(work, entry).exists() and there != entry["signature"]:
            raise ChangedError(entry["path"])
    for entry in manifest["files"]:
        source, claimed = folder / _dropped_name(entry), _claimed(folder, work, entry)
        copied = _copy_of(work, entry).exists()
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
    """Undo it: every file gets its name in the inbox again, and the work folder goes.

    Raises:
        HalfTakenError: some of the files are elsewhere, as it seems; nothing has changed.
        OSError: a file cannot be moved; called again, it goes on.
    """
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(files.folder_below(inbox, manifest["folder"]))
        except (FileNotFoundError, NotADirectoryError):
            folder = None
        elsewhere = _not_in(folder, work, manifest)
        copied = any(_copy_of(work, entry).exists() for entry in manifest["files"])
        # In the inbox that they were taken from what is missing was removed by somebody.
        if elsewhere and ((copied and folder is None) or not _is_same(inbox, manifest)):
            raise HalfTakenError(errno.ENOENT, _told_of_half(work, inbox / manifest["folder"], elsewhere))
        if folder is not None:
            for entry in manifest["files"]:
                _put_one_back(folder, work, entry)
            files.sync_folder(folder)
    files.discard_folder(work)


def _put_one_back(folder: Path, work: Path, entry: dict[str, Any]) -> None:
    source, claimed, copy = (
        folder / _dropped_name(entry),
        _claimed(folder, work, entry),
        _copy_of(work, entry),
    )
    if _signature(claimed) is not None:
        files.rename_to_free_name(claimed, source)
    elif _signature(source) != entry["signature"] and (copy.exists() or _back(folder, work, entry).exists()):
        # The copy is all there is: another file may have come under its name.
        for target in files.free_names(source):
            with contextlib.suppress(FileExistsError):
                moving.move(copy, target, part=_back_part(work, entry))
                break


def _not_in(folder: Path | None, work: Path, manifest: dict[str, Any]) -> list[str]:
    """Name the files of which nothing lies in the folder: neither hidden nor under their own names."""
    if folder is None:
        return [_dropped_name(entry) for entry in manifest["files"]]
    return [
        _dropped_name(entry)
        for entry in manifest["files"]
        if _signature(_claimed(folder, work, entry)) is None
        and _signature(folder / _dropped_name(entry)) is None
    ]


def _is_same(inbox: Path, manifest: dict[str, Any]) -> bool:
    """Say whether this is the inbox that the files were taken from, and not what its share is mounted on."""
    try:
        return bool(inbox.stat().st_ino == manifest.get("inbox"))
    except OSError:
        return False


def _told_of_half(work: Path, folder: Path, elsewhere: list[str]) -> str:
    named = ", ".join(elsewhere[:3]) + (f" and {len(elsewhere) - 3} more" if len(elsewhere) > 3 else "")
    return (
        f"is half taken in: {named} {'is' if len(elsewhere) == 1 else 'are'} not in {folder}: is its share "
        "mounted? It goes on by itself when the files are there; if they are gone for good, drop what is in "
        f"{work / INPUTS} again and move the folder away"
    )


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
