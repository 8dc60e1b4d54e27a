"""Takes settled files out of the inbox, checks them, and records the job.

The order matters: a manifest names the files; ``claiming`` moves them to the work folder; the job's row is
written. What a crash leaves in between is finished at the next start.
"""

import contextlib
import errno
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from framepackd import files
from framepackd.inbox.naming import Group
from framepackd.intake import variations
from framepackd.intake.claiming import ChangedError, HalfTakenError, bring_in, put_back, signature_of
from framepackd.intake.resolve import PicturesRead, Resolved, resolve
from framepackd.jobs import drafts, job_warnings
from framepackd.jobs.database import StoreError
from framepackd.jobs.folder import (
    INPUTS,
    MANIFEST,
    DamagedFolderError,
    DroppedFile,
    Manifest,
    clear_work_folder,
    list_work_folders,
    read_manifest,
    remove_empty,
)
from framepackd.jobs.job import ENDED, Job, State, utc_now
from framepackd.jobs.store import JobStore
from framepackd.problems import Problem
from framepackd.settings.config import Config
from framepackd.text import printable, rest_of_name

log = logging.getLogger(__name__)

MAX_FOREIGN = 5  # problems for things that are not ours; more share one

# One at a time: a job that is being taken in looks like one that a crash has left.
_taking = threading.Lock()
_making: set[Path] = set()  # work folders that have no name yet and are being filled by a thread


class Leftovers(NamedTuple):
    """The jobs that ``adopt_leftovers`` recorded, and what it could not finish or must not touch."""

    jobs: list[Job]
    problems: list[Problem]


def take(group: Group, config: Config, store: JobStore) -> list[Job]:
    """Take a settled group out of the inbox and record its job, or those of its variations.

    A mistake in the files makes a job that fails with the reason.

    Raises:
        ChangedError: a file has changed since it had settled; all are where they were.
        HalfTakenError: it can be neither done nor undone for now; ``adopt_leftovers`` tries again.
        OSError: the files cannot be moved; they are where they were.
    """
    with _taking:
        for path, settled in group.signatures.items():
            if signature_of(config.inbox / path) != settled:
                raise ChangedError(path)
        work = config.jobs_dir / _new_id()
        manifest = _manifest(group, config.inbox)
        _begin(work, manifest)
        try:
            bring_in(work, manifest, config.inbox)
            return _record(work, manifest, config, store)
        except OSError:
            _undo(work, config.inbox)
            raise


def _undo(work: Path, inbox: Path) -> None:
    """Put everything back.

    Raises:
        HalfTakenError: it cannot be done now, and the work folder stays.
    """
    try:
        manifest = read_manifest(work)  # by now it may name variations
        if manifest.variations:
            variations.undo(work, manifest)
        put_back(work, manifest, inbox)
    except HalfTakenError:
        raise
    except OSError as error:
        reason = (
            f"is half taken in: its files can be neither taken nor put back ({error.strerror}): tried again"
        )
        raise HalfTakenError(errno.EIO, reason) from error


def _manifest(group: Group, inbox: Path) -> Manifest:
    """Name the files to be taken, their roles and the inbox."""
    roles = {path: role for role in group.files for path in group.files[role]}
    return Manifest(
        folder=group.folder,
        name=group.name,
        defaults=tuple(group.defaults),
        inbox=inbox.stat().st_ino,  # tells it from the empty folder that its share is mounted on
        files=tuple(
            DroppedFile(
                path=path,
                role=roles[path],
                signature=group.signatures[path],
                file=_name_in_work_folder(group.name, path, roles[path]),
            )
            for path in group.paths
        ),
    )


def _begin(work: Path, manifest: Manifest) -> None:
    """Make a work folder with its manifest."""
    try:
        (work / INPUTS).mkdir(parents=True)
        manifest.write(work)
        files.sync_folder(work.parent)
    except OSError:
        with contextlib.suppress(OSError, DamagedFolderError):
            remove_empty(work)  # on a full disk each try would leave one
        raise


def take_final(draft: Job, sources: Mapping[str, Path], config: Config, store: JobStore) -> Job:
    """Take in copies of a draft's files, by role, to have its final made.

    As with variations, the work folder is complete when it has its name.

    Raises:
        OSError: they cannot be copied; nothing is left.
    """
    name, work = f"{draft.name}_final", config.jobs_dir / _new_id()
    making = files.hidden_part(work)
    named = {role: name + rest_of_name(entry["file"], draft.name) for role, entry in draft.inputs.items()}
    named[drafts.ROLE] = f"{name}{drafts.SUFFIX}.json"
    prefix = f"{draft.folder}/" if draft.folder else ""
    dropped = (DroppedFile(path=prefix + file, role=role, signature=()) for role, file in named.items())
    manifest = Manifest(folder=draft.folder, name=name, defaults=(), files=tuple(dropped))
    _making.add(making)
    try:
        (making / INPUTS).mkdir(parents=True)
        for role, source in sources.items():  # the outbox may hang: taking in goes on meanwhile
            files.copy(source, making / INPUTS / named[role])
        files.write_json(making / INPUTS / named[drafts.ROLE], draft.record())
        files.sync_folder(making / INPUTS)
        manifest.write(making)
        with _taking:
            making.rename(work)
            files.sync_folder(work.parent)
            return _add(work, manifest, resolve(work, manifest, config, store), store)
    except OSError:
        shutil.rmtree(making, ignore_errors=True)
        raise
    finally:
        _making.discard(making)


def _name_in_work_folder(name: str, path: str, role: str) -> str | None:
    """Name a keyframe or a draft's record after its job, whatever it was called; None for other files."""
    if role == drafts.ROLE:
        return f"{name}{drafts.SUFFIX}.json"
    kind, _, number = role.partition("-")
    return f"{name}_section_{number}{Path(path).suffix}" if kind == "keyframe" else None


def adopt_leftovers(config: Config, store: JobStore) -> Leftovers:
    """Finish what was interrupted between the inbox and the database.

    It can be called at any time. What cannot be finished or is not ours stays as it is and is reported.

    Raises:
        StoreError: the database cannot be used.
        OSError: the work folders cannot be listed.
    """
    with _taking:
        # List the folders before asking the database: jobs that are recorded meanwhile are known then.
        names, half_made, foreign = list_work_folders(config.jobs_dir)
        known = store.states()
        left = Leftovers([], _foreign(foreign))
        pictures: PicturesRead = {}
        for hidden in half_made:
            if hidden not in _making:
                shutil.rmtree(hidden, ignore_errors=True)
        for work in (config.jobs_dir / name for name in names if name not in known):
            try:
                jobs = _finish(work, config, store, known, pictures)
            except StoreError:
                raise
            except Exception as error:  # one odd folder must not stop the others
                left.problems.append(Problem("intake", printable(_unfinished(work, error))))
                continue
            for job in jobs:
                log.info("job %s: taken in after a crash during its intake", job.id)
            left.jobs.extend(jobs)
            known |= {job.id: job.state for job in jobs}
        return left


def clear_ended(config: Config, store: JobStore) -> None:
    """Remove work folders that jobs left at their end; only at a start, before any files move.

    Raises:
        StoreError: the database cannot be used.
        OSError: the work folders cannot be listed.
    """
    names, _, _ = list_work_folders(config.jobs_dir)
    known = store.states()
    for name in names:
        if known.get(name) in ENDED:
            try:
                clear_work_folder(config.jobs_dir / name, failed=known[name] == State.FAILED)
            except OSError as error:
                log.warning("job %s: what is left of it cannot be removed: %s", name, error)


def _foreign(foreign: list[Path]) -> list[Problem]:
    texts = [f"{path} is not framepackd's: move it away" for path in foreign[:MAX_FOREIGN]]
    if len(foreign) > MAX_FOREIGN:
        rest = len(foreign) - MAX_FOREIGN
        texts.append(f"{foreign[0].parent} holds {rest} more that are not framepackd's: move them away")
    return [Problem("foreign", printable(text)) for text in texts]


def _unfinished(work: Path, error: Exception) -> str:
    """Say why a work folder's intake cannot be finished, and what to do."""
    if isinstance(error, DamagedFolderError | HalfTakenError):
        return f"{work} {error.args[-1]}"
    if not isinstance(error, OSError):
        log.error("job %s", work.name, exc_info=error)
        return f"{work}: an error of framepackd's own ({type(error).__name__}: {error}): please report it"
    where = f": {error.filename}" if error.filename else ""
    return (
        f"{work} is of a job whose intake or end cannot be finished ({error.strerror}{where}): put that "
        "right, and it is finished by itself"
    )


def _finish(
    work: Path, config: Config, store: JobStore, known: dict[str, str], pictures: PicturesRead
) -> list[Job]:
    """Finish the intake of one work folder, and give the jobs that this records.

    Raises:
        DamagedFolderError: it is not as framepackd leaves a folder.
        OSError: it cannot be finished, for now.
    """
    if work.name in known:  # a variation, recorded a moment ago
        return []
    if not os.path.lexists(work / MANIFEST):
        remove_empty(work)
        return []
    manifest = read_manifest(work)
    if not manifest.variations:
        try:
            bring_in(work, manifest, config.inbox)
        except ChangedError:
            put_back(work, manifest, config.inbox)
            return []
    return _record(work, manifest, config, store, known, pictures)


def _new_id() -> str:
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def _record(
    work: Path,
    manifest: Manifest,
    config: Config,
    store: JobStore,
    known: Collection[str] = (),
    pictures: PicturesRead | None = None,
) -> list[Job]:
    """Check the files and write the job's row, or those of its variations, except known ones.

    Raises:
        OSError: there is no room for the variations; no row is written.
    """
    pictures = {} if pictures is None else pictures
    if not manifest.variations:
        resolved = resolve(work, manifest, config, store, pictures)
        if resolved.seeds == 1:
            return [_add(work, manifest, resolved, store)]
        seeds = variations.choose_seeds(resolved.settings["seed"], resolved.seeds)
        manifest = variations.plan(manifest, seeds, [_new_id() for _ in seeds])
        manifest.write(work)
    variations.spread(work, manifest, known)
    jobs = []
    for variation in manifest.variations:
        if variation.id not in known:
            folder = config.jobs_dir / variation.id
            own = read_manifest(folder)
            jobs.append(_add(folder, own, resolve(folder, own, config, store, pictures), store))
    return jobs


def _add(work: Path, manifest: Manifest, resolved: Resolved, store: JobStore) -> Job:
    job = Job(
        id=work.name,
        name=manifest.name,
        folder=manifest.folder,
        state=State.QUEUED,
        created_at=utc_now(),
        **resolved.columns(),
    )
    level, words = logging.INFO, f"{job.frames} frames ({job.frames / 30:.2f} s), {job.width}x{job.height}"
    if resolved.delivery is not None:
        level = logging.WARNING if resolved.delivery["state"] == State.FAILED else logging.INFO
        words = resolved.delivery["error"] or words
    log.log(level, "job %s: %s taken in: %s", job.id, job.path, words)
    for warning in job_warnings.of_crf(job.settings):
        log.warning("job %s: %s", job.id, warning)
    return store.add(job)
