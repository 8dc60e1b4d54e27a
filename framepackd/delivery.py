"""From the work folder to the outbox or the failed folder: complete, under a free name, never half.

A delivery can be repeated after a crash at any line: a file that is not in the work folder any more has
been delivered, whatever has become of it since.
"""

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from framepackd import files
from framepackd.config import Config
from framepackd.database import Job, State, utc_now
from framepackd.groups import OF_A_VIDEO
from framepackd.intake import INPUTS, clear_work_folder
from framepackd.jobs import JobStore
from framepackd.names import rest_of_name
from framepackd.results import STRIP, keep_strip

log = logging.getLogger(__name__)

RESULT = "result"  # what the worker wrote: .mp4 and stills, named by what follows NAME
OUTGOING = "outgoing"  # everything to deliver, under its final name
VIDEO = ".mp4"
SOURCE = ".source"  # NAME.source.mp4: the video as it was before


def deliver(job: Job, config: Config, store: JobStore, *, stop: Callable[[], bool] = lambda: False) -> None:
    """Move the files of a job whose end is decided to where they belong, and end it.

    Raises:
        OSError: the target cannot be written (full, read-only, gone); nothing is lost, try again later.
    """
    assert job.delivery is not None
    state = State(job.delivery["state"])
    root = config.outbox if state in (State.DONE, State.SKIPPED) else config.failed
    target = root / job.folder
    files.make_folder(target)
    work = config.jobs_dir / job.id
    outgoing = work / OUTGOING
    if not outgoing.exists():
        _prepare(job, state, work, target)
    stem_file = work / "stem"
    while True:
        stem = stem_file.read_text(encoding="utf-8")
        try:
            _move_all(job, outgoing, target, stem)
            break
        except FileExistsError:  # somebody took the name since it was chosen: the rest goes under another
            names = [*(path.name for path in outgoing.iterdir()), *_parts(job, target)]
            files.write_text(stem_file, free_stem(job.name, names, target, after=stem))
    output = target / f"{stem}{VIDEO}" if state is State.DONE else None
    if output is not None:
        keep_strip(work / RESULT / STRIP, config.outbox, job.id)
    store.finish(
        job.id, state, error=job.delivery["error"], output=str(output) if output else None, stem=stem
    )
    clear_work_folder(work, state)
    log.info("job %s: %s: %s", job.id, state.value, output or job.delivery["error"] or target)


def _prepare(job: Job, state: State, work: Path, target: Path) -> None:
    """Gather what is to be delivered, and fix the name it goes under."""
    if state is State.DONE and not work.exists():
        raise FileNotFoundError(
            errno.ENOENT, "its video is missing, bring back jobs/ from a backup", str(work)
        )
    staging = work / f"{files.PART_PREFIX}{OUTGOING}"
    files.make_folder(staging)
    rests = {
        entry["file"]: name_of_input(job, role, entry["file"], state) for role, entry in job.inputs.items()
    }
    for path in (work / INPUTS).glob("*"):
        rest = rest_of_name(path.name, job.name)
        path.rename(staging / (job.name + rests.get(path.name, rest)))
    if state is State.DONE or (state is State.CANCELLED and job.cancel == "keep"):
        for path in (work / RESULT).glob(".*"):
            if not path.name.startswith(files.PART_PREFIX):
                path.rename(staging / f"{job.name}{path.name}")
    if state in (State.DONE, State.SKIPPED):
        files.write_json(staging / f"{job.name}.json", final_record(job))
    else:
        delivered = (job.name + rests[entry["file"]] for entry in job.inputs.values())
        absent = [name for name in delivered if not (staging / name).exists()]
        files.write_text(staging / f"{job.name}.{_reason_name(state)}.txt", _reason(job, absent))
    names = [path.name for path in staging.iterdir()]
    files.write_text(work / "stem", free_stem(job.name, names, target))
    files.sync_folder(staging)
    staging.rename(work / OUTGOING)
    files.sync_folder(work)


def name_of_input(job: Job, role: str, file: str, state: State) -> str:
    """Say what follows NAME where an input is delivered: a video that was made longer gives its name away."""
    rest = rest_of_name(file, job.name)
    if role not in OF_A_VIDEO or state is State.FAILED or (state is State.CANCELLED and job.cancel != "keep"):
        return rest
    return f"{SOURCE}{rest}"


def free_stem(name: str, names: list[str], target: Path, after: str | None = None) -> str:
    """Find a name under which none of the files exists yet: NAME, NAME_001, NAME_002 ...

    Names are looked up in the folder itself, which may not tell upper from lower case.

    Raises:
        OSError: there are a thousand of them.
    """
    stems = [name, *(f"{name}_{number:03}" for number in range(1, 1000))]
    for stem in stems[stems.index(after) + 1 if after in stems else 0 :]:
        if not any(os.path.lexists(target / (stem + rest_of_name(other, name))) for other in names):
            return stem
    raise OSError(errno.EBUSY, "a thousand results have this name, move some away", str(target / name))


def _parts(job: Job, target: Path) -> list[str]:
    """Name the files that were copied across file systems and have not got their names yet."""
    prefix, suffix = f"{files.PART_PREFIX}{job.id}-", ".part"
    return [
        path.name.removeprefix(prefix).removesuffix(suffix)
        for path in target.iterdir()
        if path.name.startswith(prefix) and path.name.endswith(suffix)
    ]


def _move_all(job: Job, outgoing: Path, target: Path, stem: str) -> None:
    def final(name: str) -> Path:
        return target / (stem + rest_of_name(name, job.name))

    for name in _parts(job, target):  # copied before a crash
        files.move(outgoing / name, final(name), part=f"{job.id}-{name}")
    # The video last: where it is, everything is.
    for path in sorted(outgoing.iterdir(), key=lambda path: (path.suffix == VIDEO, path.name)):
        files.move(path, final(path.name), part=f"{job.id}-{path.name}")


def _reason_name(state: State) -> str:
    return "error" if state is State.FAILED else state.value


def _reason(job: Job, absent: list[str]) -> str:
    """Say why there is no video, and what can be done; ``absent`` files were not there to be delivered."""
    assert job.delivery is not None
    told = f"{job.delivery['error']}\n\n{job.path} (job {job.id}) was not made into a video. "
    if absent:
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
