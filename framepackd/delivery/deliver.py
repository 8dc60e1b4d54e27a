"""Moves a job's files to the outbox or the failed folder: complete, under a free name, never half.

First a plan is written: which file of the work folder goes where. Then the files are gathered in one folder,
a name is chosen, and they are moved. After a crash at any line the delivery is repeated: a file of the plan
that is not in the work folder any more has been delivered, whatever became of it since. If the plan was made
for another end of the job, the files are taken back first.
"""

import contextlib
import errno
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from framepackd import files
from framepackd.delivery import target_names
from framepackd.delivery.draft_records import name_in_draft
from framepackd.delivery.results import keep_strip
from framepackd.files import moving
from framepackd.files.moving import Progress
from framepackd.inbox.naming import OF_A_VIDEO
from framepackd.jobs.folder import (
    INPUTS,
    MOVING,
    OUTGOING,
    PLAN,
    RESULT,
    SOURCE,
    STRIP,
    VIDEO,
    clear_work_folder,
    where,
)
from framepackd.jobs.job import Job, State, utc_now
from framepackd.jobs.store import JobStore
from framepackd.settings.config import Config
from framepackd.text import duration, printable, rest_of_name, stand_ins

log = logging.getLogger(__name__)


@dataclass
class DeliveryPlan:
    """What is delivered where, as ``delivery.json`` in the work folder has it."""

    state: str
    root: str  # the outbox or the failed folder
    files: dict[str, str | None]  # NAME.mp4 -> result/.mp4 in the work folder; None: written for the delivery
    elsewhere: list[str] = field(default_factory=list)  # files that were delivered by an earlier plan
    folder: str = ""  # below the root, under a name that the file system can hold
    name: str = ""  # NAME, or what stands for it on this file system
    stem: str = ""  # that, with a number if it was taken; empty until all files are gathered

    @property
    def target(self) -> Path:
        """The folder that the files go to."""
        return Path(self.root, self.folder)

    def write(self, work: Path) -> None:
        """Write the plan into a work folder, durable when this returns."""
        files.write_json(work / PLAN, asdict(self))


def deliver(job: Job, config: Config, store: JobStore, *, progress: Progress | None = None) -> None:
    """Move the files of a job whose end is decided to the outbox or the failed folder, and end it.

    Raises:
        StoppedError: ``progress.stop`` said so; the next call resumes.
        OSError: the target cannot be written (full, read-only, gone); nothing is lost, try again later.
    """
    assert job.delivery is not None
    state = State(job.delivery["state"])
    work = config.jobs_dir / job.id
    plan = _plan(job, state, config, work)
    if not plan.stem:
        _gather(job, plan, work)
    target_names.make_below(Path(plan.root), plan.folder, job.id)
    _move_all(job, plan, work, progress or Progress())
    output = plan.target / f"{plan.stem}{VIDEO}" if state is State.DONE else None
    if output is not None:
        keep_strip(work / RESULT / STRIP, config.outbox, job.id)
        name_in_draft(job, output, config, store)
    stem = plan.stem if plan.folder == job.folder else f"{plan.folder}/{plan.stem}"
    store.finish(
        job.id, state, error=job.delivery["error"], output=str(output) if output else None, stem=stem
    )
    clear_work_folder(work, failed=state is State.FAILED)
    level = logging.WARNING if state is State.FAILED else logging.INFO
    words = state.value
    if state is State.DONE and job.started_at is not None:
        took = datetime.now(UTC) - datetime.fromisoformat(job.started_at)
        words += f" in {duration(took.total_seconds())}"
    log.log(level, "job %s: %s: %s", job.id, words, output or job.delivery["error"] or plan.target)


def _plan(job: Job, state: State, config: Config, work: Path) -> DeliveryPlan:
    """Read or make the plan for the decided end; take back what was gathered for another end.

    Raises:
        OSError: a video that was made is not there, or the work folder cannot be written.
    """
    root = str(getattr(config, state.folder))
    try:
        plan: DeliveryPlan | None = DeliveryPlan(**json.loads((work / PLAN).read_text(encoding="utf-8")))
    except FileNotFoundError:
        plan = _plan_of_older_version(job, state, config, work)
    if plan is not None and (plan.state, plan.root) == (state, root):
        return plan
    if state is State.DONE and not work.exists():
        raise FileNotFoundError(
            errno.ENOENT, "its video is missing, bring back jobs/ from a backup", str(work)
        )
    files.make_folder(work)
    elsewhere = _take_back(job, plan, work) if plan else []
    plan = DeliveryPlan(state, root, _files(job, state, work), elsewhere)
    plan.write(work)
    return plan


def _files(job: Job, state: State, work: Path) -> dict[str, str | None]:
    """Give what is to be delivered, by its name, and where in the work folder it is."""
    rests = {
        entry["file"]: name_of_input(job, role, entry["file"], state) for role, entry in job.inputs.items()
    }
    found: dict[str, str | None] = {_text_name(job, state): None}
    for path in _shown(work / INPUTS):
        rest = rests.get(path.name, rest_of_name(path.name, job.name))
        found[job.name + rest] = f"{INPUTS}/{path.name}"
    if state is State.DONE or (state is State.CANCELLED and job.cancel == "keep"):
        found |= {job.name + path.name: f"{RESULT}/{path.name}" for path in _shown(work / RESULT)}
    return found


def _shown(folder: Path) -> Iterator[Path]:
    """List a folder of the work folder, without hidden files of ours."""
    return (path for path in folder.glob("*") if not path.name.startswith(files.PART_PREFIX))


def _text_name(job: Job, state: State) -> str:
    """Name the text that is written for the delivery: the record, or why there is no video."""
    if state in (State.DONE, State.SKIPPED):
        return f"{job.name}.json"
    return f"{job.name}.{'error' if state is State.FAILED else state.value}.txt"


def _gather(job: Job, plan: DeliveryPlan, work: Path) -> None:
    """Gather what is to be delivered in one folder, and choose a free name."""
    outgoing = work / OUTGOING
    outgoing.mkdir(exist_ok=True)
    for path in outgoing.iterdir():
        if path.name not in plan.files:
            path.unlink()  # the text for another end
    for name, origin in plan.files.items():
        if origin is not None and (work / origin).exists():
            (work / origin).rename(outgoing / name)
    plan.folder = target_names.make_below(Path(plan.root), job.folder, job.id)
    plan.name, stem = _choose(job, plan, list(plan.files))
    _write_text(job, plan, outgoing / _text_name(job, State(plan.state)))
    files.sync_folder(outgoing)
    plan.stem = stem
    plan.write(work)


def _write_text(job: Job, plan: DeliveryPlan, path: Path) -> None:
    if path.suffix == ".txt":
        files.write_text(path, _reason(job, plan))
        return
    true, delivered = (
        "/".join(filter(None, names)) for names in ((job.folder, job.name), (plan.folder, plan.name))
    )
    replaced = {"delivered_as": delivered} if delivered != true else {}
    files.write_json(path, final_record(job) | replaced)


def _choose(job: Job, plan: DeliveryPlan, names: list[str]) -> tuple[str, str]:
    """Choose what NAME is called in the target, and the free stem.

    Raises:
        OSError: the target cannot be written.
    """
    rests = [rest_of_name(name, job.name) for name in names]
    known = stand_ins(job.name)
    folder, stem = where(job)
    if job.stem and folder == plan.folder and _missing(job, plan):
        known = list(dict.fromkeys((stem, *known)))  # the rest of its files are still there
    if plan.name in known:
        known = known[known.index(plan.name) :]
    for name in known[:-1]:
        stem = target_names.free_stem(name, rests, plan.target, plan.stem or None)
        if target_names.holds(plan.target, job.id, stem + max(rests, key=len)):
            return name, stem
        log.info("job %s: %s cannot hold the name %r", job.id, plan.target, stem)
    return known[-1], target_names.free_stem(known[-1], rests, plan.target, plan.stem or None)


def _missing(job: Job, plan: DeliveryPlan) -> list[str]:
    """Name the dropped files that are not in the work folder to be delivered."""
    planned = plan.files.values()
    return [file for entry in job.inputs.values() if f"{INPUTS}/{(file := entry['file'])}" not in planned]


def _take_back(job: Job, plan: DeliveryPlan, work: Path) -> list[str]:
    """Move what was gathered for another end back; gives the files that were delivered already."""
    outgoing = work / OUTGOING
    elsewhere = list(plan.elsewhere)
    for name, origin in plan.files.items():
        source, target = outgoing / name, plan.target / (plan.stem + rest_of_name(name, job.name))
        part = _part(job, name)
        with contextlib.suppress(OSError):  # if in doubt deliver it again: better twice than never
            if source.exists() and moving.was_moved(source, target, part=part, note=work / MOVING):
                files.sync_folder(target.parent)
                source.unlink()
        with contextlib.suppress(OSError):  # the target may be gone, or read-only
            moving.part_beside(target, part).unlink(missing_ok=True)
        if origin is not None and source.exists():
            (work / origin).parent.mkdir(exist_ok=True)
            source.rename(work / origin)
        elif plan.stem and not source.exists() and not (origin and (work / origin).exists()):
            elsewhere.append(str(target))
    shutil.rmtree(plan.target / f"{files.PART_PREFIX}{job.id}-names", ignore_errors=True)
    (work / MOVING).unlink(missing_ok=True)
    for folder in (work / OUTGOING, work / INPUTS, work / RESULT, work):
        if folder.exists():
            files.sync_folder(folder)
    return elsewhere


def _plan_of_older_version(job: Job, state: State, config: Config, work: Path) -> DeliveryPlan | None:
    """Make a plan of what a version without plans has gathered; None if it gathered nothing."""
    outgoing, staging = work / OUTGOING, work / f"{files.PART_PREFIX}{OUTGOING}"
    stem = work / "stem"
    if staging.exists() and not outgoing.exists():
        stem.unlink(missing_ok=True)
        staging.rename(outgoing)
    if not outgoing.exists():
        return None
    state = _end_of_older_version(job, state, {path.name for path in outgoing.iterdir()})
    plan = DeliveryPlan(
        state, str(getattr(config, state.folder)), _files(job, state, work), folder=job.folder, name=job.name
    )
    plan.stem = stem.read_text(encoding="utf-8") if stem.exists() else ""
    _bring_home(job, plan, outgoing)
    origins = {
        name_of_input(job, role, entry["file"], state): f"{INPUTS}/{entry['file']}"
        for role, entry in job.inputs.items()
    }
    for path in _shown(outgoing):
        rest = rest_of_name(path.name, job.name)
        made = f"{RESULT}/{rest}" if job.inputs else f"{INPUTS}/{path.name}"
        plan.files.setdefault(path.name, origins.get(rest, made))
    plan.write(work)
    return plan


def _end_of_older_version(job: Job, state: State, names: set[str]) -> State:
    """Infer from the names for which end files were gathered: the job may have been cancelled since."""
    for end in (State.FAILED, State.CANCELLED):
        if _text_name(job, end) in names:
            return end
    if state is State.CANCELLED and _text_name(job, State.DONE) in names:
        is_record = "record" not in job.inputs or f"{job.name}{SOURCE}.json" in names
        return State.DONE if is_record else state
    return state


def _bring_home(job: Job, plan: DeliveryPlan, outgoing: Path) -> None:
    """Bring back files that an older version had copied and removed here, but not yet renamed there."""
    prefix, suffix = f"{files.PART_PREFIX}{job.id}-", ".part"
    for part in plan.target.glob(f"{prefix}*{suffix}"):
        home = outgoing / part.name.removeprefix(prefix).removesuffix(suffix)
        if not home.exists():
            copied = outgoing / part.name
            files.copy(part, copied)
            copied.rename(home)
            files.sync_folder(outgoing)
        with contextlib.suppress(OSError):  # read-only by now
            part.unlink()


def name_of_input(job: Job, role: str, file: str, state: State) -> str:
    """Give what follows NAME when an input is delivered: an extended video becomes NAME.source.mp4."""
    rest = rest_of_name(file, job.name)
    if role not in OF_A_VIDEO or state is State.FAILED or (state is State.CANCELLED and job.cancel != "keep"):
        return rest
    return f"{SOURCE}{rest}"


def _part(job: Job, name: str) -> str:
    """Name the hidden copy of a file, without NAME so that any file system can hold it."""
    return f"{job.id}-.{rest_of_name(name, job.name)}"


def _move_all(job: Job, plan: DeliveryPlan, work: Path, progress: Progress) -> None:
    # The video last: where it is, everything is.
    waiting = sorted(_shown(work / OUTGOING), key=lambda path: (path.suffix == VIDEO, path.name))
    progress.total = sum(path.stat().st_size for path in waiting)
    while waiting:
        path = waiting[0]
        target = plan.target / f"{plan.stem}{rest_of_name(path.name, job.name)}"
        part = _part(job, path.name)
        try:
            moving.move(path, target, part=part, note=work / MOVING, progress=progress)
            del waiting[0]
        except FileExistsError:  # the name was taken since it was chosen: the rest gets another one
            plan.name, plan.stem = _choose(job, plan, [path.name for path in waiting])
            plan.write(work)
            if (text := work / OUTGOING / _text_name(job, State(plan.state))).exists():
                _write_text(job, plan, text)


def _reason(job: Job, plan: DeliveryPlan) -> str:
    """Say why there is no video, where its files are, and what can be done."""
    assert job.delivery is not None
    error, who = job.delivery["error"], f"{job.path} (job {job.id})"
    if plan.elsewhere:
        before = "".join(f"{printable(path)}\n" for path in plan.elsewhere)
        return (
            f"{error}\n\nOf {who} this had been delivered before:\n{before}\nWhat is left lies beside this.\n"
        )
    absent = [] if job.stem else _missing(job, plan)
    if absent:
        remedy = (
            f"What was dropped for it was not in its work folder and is not here: {', '.join(absent)}. "
            "To have it made, drop the files into the inbox again."
        )
    elif job.settings:
        remedy = (
            "Its files lie beside this one. To make it as it was asked for, with the same seed: "
            f"framepackd retry {job.id}. To change anything, drop the files into the inbox again."
        )
    else:
        remedy = (
            "Its files lie beside this one: put right what is wrong and drop them into the inbox again, or "
            f"leave them here and run: framepackd retry {job.id}"
        )
    return f"{error}\n\n{who} was not made into a video. {remedy}\n"


def final_record(job: Job) -> dict[str, Any]:
    """Give the job's record as it will be once it is delivered."""
    assert job.delivery is not None
    ended = {"state": job.delivery["state"], "error": job.delivery["error"], "finished_at": utc_now()}
    return {key: value for key, value in (job.record() | ended).items() if key != "output"}
