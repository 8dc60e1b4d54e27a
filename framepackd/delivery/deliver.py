"""Moves a job's files to the outbox or the failed folder: complete, under a free name, never half.

First a plan is written: what goes where, and from where in the work folder it comes. Then the files are
gathered, the name is chosen, and they are moved. A delivery can be repeated after a crash at any line: a file
of the plan that is not in the work folder any more has been delivered, whatever has become of it since. Where
the plan was made for another end, the files are taken back first.
"""

import contextlib
import errno
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from framepackd import files, moving
from framepackd.delivery import target_names
from framepackd.delivery.results import keep_strip
from framepackd.inbox.naming import OF_A_VIDEO
from framepackd.jobs.folder import (
    INPUTS,
    MOVING,
    OUTGOING,
    PLAN,
    RESULT,
    SOURCE,
    STRIP,
    clear_work_folder,
    where,
)
from framepackd.jobs.job import Job, State, utc_now
from framepackd.jobs.store import JobStore
from framepackd.moving import Progress
from framepackd.settings.config import Config
from framepackd.text import printable, rest_of_name, stand_ins

log = logging.getLogger(__name__)

VIDEO = ".mp4"


@dataclass
class DeliveryPlan:
    """What is delivered where, as ``delivery.json`` in the work folder has it."""

    state: str
    root: str  # the outbox or the failed folder
    files: dict[str, str | None]  # NAME.mp4 -> result/.mp4 in the work folder; None: written for the delivery
    elsewhere: list[str] = field(default_factory=list)  # what had been delivered when it was planned anew
    folder: str = ""  # below the root, as it can be called there
    name: str = ""  # what NAME can be called there
    stem: str = ""  # that, with a number where it was taken; empty until all is gathered

    @property
    def target(self) -> Path:
        """The folder that the files go to."""
        return Path(self.root, self.folder)

    def write(self, work: Path) -> None:
        """Write it down, durable when this returns."""
        files.write_json(work / PLAN, asdict(self))


def deliver(
    job: Job,
    config: Config,
    store: JobStore,
    *,
    progress: Progress | None = None,
) -> None:
    """Move the files of a job whose end is decided to where they belong, and end it.

    Raises:
        StoppedError: ``progress.stop`` said so; the next call goes on.
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
    stem = plan.stem if plan.folder == job.folder else f"{plan.folder}/{plan.stem}"
    store.finish(
        job.id, state, error=job.delivery["error"], output=str(output) if output else None, stem=stem
    )
    clear_work_folder(work, state)
    level = logging.WARNING if state is State.FAILED else logging.INFO
    log.log(level, "job %s: %s: %s", job.id, state.value, output or job.delivery["error"] or plan.target)


def _plan(job: Job, state: State, config: Config, work: Path) -> DeliveryPlan:
    """Give the plan for the end that is decided; what was gathered for another one is taken back.

    Raises:
        OSError: a video that was made is not there, or the work folder cannot be written.
    """
    root = str(getattr(config, state.folder))
    plan = _written_plan(work) or _plan_of_older_version(job, state, config, work)
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


def _written_plan(work: Path) -> DeliveryPlan | None:
    try:
        return DeliveryPlan(**json.loads((work / PLAN).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def _files(job: Job, state: State, work: Path) -> dict[str, str | None]:
    """Say what is to be delivered under which name, and where it is."""
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
    """List a folder of the work folder without what is half written."""
    return (path for path in folder.glob("*") if not path.name.startswith(files.PART_PREFIX))


def _text_name(job: Job, state: State) -> str:
    """Name what is written for the delivery: the record, or the reason why there is none."""
    if state in (State.DONE, State.SKIPPED):
        return f"{job.name}.json"
    return f"{job.name}.{'error' if state is State.FAILED else state.value}.txt"


def _gather(job: Job, plan: DeliveryPlan, work: Path) -> None:
    """Gather what is to be delivered, and choose the name it goes under."""
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
    """Choose what NAME is called in the target, and with which number.

    Raises:
        OSError: the target cannot be written.
    """
    rests = [rest_of_name(name, job.name) for name in names]
    known = stand_ins(job.name)
    folder, stem = where(job)
    if job.stem and folder == plan.folder and _missing(job, plan):
        known = list(dict.fromkeys((stem, *known)))  # the rest of its files lie there still
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
    """Bring what was gathered for another end back to where it was; names what was delivered already."""
    outgoing = work / OUTGOING
    elsewhere = list(plan.elsewhere)
    for name, origin in plan.files.items():
        source, target = outgoing / name, plan.target / (plan.stem + rest_of_name(name, job.name))
        part = _part(job, name)
        with contextlib.suppress(OSError):  # in doubt it was not delivered: better twice than not at all
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
    """Make the plan of what a version without plans has gathered; None if it has not begun to."""
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
    """Tell from its names for which end something was gathered: the job may have been cancelled since."""
    for end in (State.FAILED, State.CANCELLED):
        if _text_name(job, end) in names:
            return end
    if state is State.CANCELLED and _text_name(job, State.DONE) in names:
        is_record = "record" not in job.inputs or f"{job.name}{SOURCE}.json" in names
        return State.DONE if is_record else state
    return state


def _bring_home(job: Job, plan: DeliveryPlan, outgoing: Path) -> None:
    """Bring back what an older version had copied and removed from the work folder, but not named yet."""
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
    """Say what follows NAME where an input is delivered: a video that was made longer gives its name away."""
    rest = rest_of_name(file, job.name)
    if role not in OF_A_VIDEO or state is State.FAILED or (state is State.CANCELLED and job.cancel != "keep"):
        return rest
    return f"{SOURCE}{rest}"


def _part(job: Job, name: str) -> str:
    """Name the hidden copy of a file; without NAME, so that any file system can hold it."""
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
        except FileExistsError:  # somebody took the name since it was chosen: the rest goes under another
            plan.name, plan.stem = _choose(job, plan, [path.name for path in waiting])
            plan.write(work)
            if (text := work / OUTGOING / _text_name(job, State(plan.state))).exists():
                _write_text(job, plan, text)


def _reason(job: Job, plan: DeliveryPlan) -> str:
    """Say why there is no video, where its files are, and what can be done."""
    assert job.delivery is not None
    told = f"{job.delivery['error']}\n\n{job.path} (job {job.id}) was not made into a video. "
    absent = [] if job.stem or plan.elsewhere else _missing(job, plan)
    if plan.elsewhere:
        told = f"{job.delivery['error']}\n\nOf {job.path} (job {job.id}) this had been delivered before:\n"
        told += (
            "".join(f"{printable(path)}\n" for path in plan.elsewhere) + "\nWhat is left lies beside this.\n"
        )
    elif absent:
        told += (
            f"What was dropped for it was not in its work folder and is not here: {', '.join(absent)}. "
            "To have it made, drop the files into the inbox again.\n"
        )
    elif job.settings:
        told += (
            "Its files lie beside this one. To make it as it was asked for, with the same seed: "
            f"framepackd retry {job.id}. To change anything, drop the files into the inbox again.\n"
        )
    else:
        told += (
            "Its files lie beside this one: put right what is wrong and drop them into the inbox again, or "
            f"leave them here and run: framepackd retry {job.id}\n"
        )
    return told


def final_record(job: Job) -> dict[str, Any]:
    """Give the job as it will stand when it is delivered."""
    assert job.delivery is not None
    ended = {"state": job.delivery["state"], "error": job.delivery["error"], "finished_at": utc_now()}
    return {key: value for key, value in (job.record() | ended).items() if key != "output"}
