"""Checks what must be there before a job starts: its files, its model, its GPU, room on the disks.

Room is an upper estimate: better to refuse a video before its night than in it.
"""

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from framepack_core.errors import FramePackError
from framepack_core.media.extend import frames_of, tail_latents
from framepack_core.models import model_files
from framepack_core.models.registry import BUNDLED
from framepackd.apart import within
from framepackd.jobs import aside
from framepackd.jobs.database import StoreError
from framepackd.jobs.folder import CHECKPOINT, INPUTS
from framepackd.jobs.job import Job
from framepackd.jobs.store import JobStore
from framepackd.problems import Problem
from framepackd.settings.config import Config

NVIDIA = Path("/proc/driver/nvidia")  # there while a driver is loaded
SHOWN_JOBS = 5  # of those that a problem names

# Kept free in the state folder: a few MiB for the database and its log, the rest for the system's log and
# for what is dropped into an inbox on the same disk, a hundred photos.
RESERVE_BYTES = 512 << 20

FLOAT32, RGB = 4, 3  # bytes; channels
LATENT_CHANNELS, LATENT_PIXELS = 16, 8  # a latent stands for 8x8 pixels
SAMPLER_TENSORS = 6  # of a section: up to four of the solver, two of the step cache
STATES = 3  # two are kept while the next is written
EDGES = 2  # of the section just decoded and of the one before
# The video's share of its raw frames, falling with crf. White noise took 0.51 at crf 0, 0.46 at 1, 0.26 at
# 16, 0.10 at 30; at 16 a photo with heavy grain took 0.10, an ordinary video 0.02.
NOISE_SHARE, WORST_CRF = 0.52, 52
ANSWER_SECONDS = 1.0  # for a disk to report its free space
BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's is


def gpu_seen() -> bool:
    """Say whether the kernel has an NVIDIA driver, whatever torch makes of it."""
    return NVIDIA.exists()


def is_gpu_expected(model: str, config: Config) -> bool:
    """Say whether ``auto`` means a GPU only: the CPU would take days with this model."""
    if model in BUNDLED:
        return False
    try:
        used = config.database.exists() and JobStore(config.database, read_only=True).gpu_used()
    except StoreError:  # the daemon reports what is wrong with it
        used = False
    return used or gpu_seen()


def missing_model(job: Job, config: Config, _: Sequence[Job] = ()) -> str | None:
    """Say which file of the job's model is missing or wrong; None if all are here and fit."""
    try:
        model_files.look(config.spec(job.settings["model"]))
    except FramePackError as error:
        return str(error)
    except (KeyError, ValueError, OSError):  # no longer in the config: the job fails and says so
        return None
    return None


def missing_room(job: Job, config: Config, running: Sequence[Job] = ()) -> str | None:
    """Say where there is too little room on a disk for the job; None if there is enough."""
    try:
        return shortage(job, config, running=running)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror}): check that its disk is there"


def without_files(store: JobStore, config: Config) -> dict[str, str]:
    """Say what to do about each queued job, by id, whose files are not in its work folder."""
    return {
        job_id: (
            f"its files are not in {config.jobs_dir / job_id}: bring back jobs/ from the same backup as "
            f"{config.database.name}, or framepackd cancel it and drop the files again"
        )
        for job_id, inputs in store.queued_inputs()
        if not has_files(job_id, inputs, config)
    }


def has_files(job_id: str, inputs: Mapping[str, Any], config: Config) -> bool:
    """Say whether all files dropped for a job are in its work folder."""
    folder = config.jobs_dir / job_id / INPUTS
    return all(os.path.lexists(folder / entry["file"]) for entry in inputs.values())


def problem_without_files(without: Mapping[str, str], config: Config) -> Problem | None:
    """Report jobs without files as one problem; None if there are none."""
    if not without:
        return None
    some = _named(without)
    jobs = "1 job waits" if len(without) == 1 else f"{len(without)} jobs wait"
    return Problem(
        "work-folders",
        f"{jobs} for files that are not in {config.jobs_dir} ({some}): bring back jobs/ from the same backup "
        f"as {config.database.name}, or framepackd cancel those that are made already or not wanted",
    )


def problem_of_other_device(waiting: Mapping[str, str]) -> Problem | None:
    """Report jobs that wait for the device they began on; a single one with its own reason."""
    if not waiting:
        return None
    if len(waiting) == 1:
        ((job_id, reason),) = waiting.items()
        return Problem("other-device", f"job {job_id} waits: {reason}")
    return Problem(
        "other-device",
        f"{len(waiting)} jobs wait for the device that they began on, a GPU or the CPU "
        f"({_named(waiting)}): bring it back (device under [gpu]) and restart, or begin anew with "
        "framepackd retry JOB --anew, which keeps what was made aside",
    )


def _named(jobs: Mapping[str, str]) -> str:
    return ", ".join(list(jobs)[:SHOWN_JOBS]) + (" ..." if len(jobs) > SHOWN_JOBS else "")


# room on the disks


def needed(job: Job) -> dict[str, int]:
    """Estimate, part by part, how many bytes a job's work folder grows to, without the inputs."""
    window = int(job.settings.get("latent_window_size", 9))
    crf = int(job.settings.get("crf", 16))
    pixels = job.width * job.height
    latent_frame = FLOAT32 * LATENT_CHANNELS * pixels // LATENT_PIXELS**2
    raw = job.frames * pixels * RGB
    video = int(raw * NOISE_SHARE * (1 - crf / WORST_CRF))
    continued = job.settings.get("continues") or {}
    tail = frames_of(tail_latents(continued["frames"])) if continued else 0
    latents = (job.sections * window + job.clips + (continued.get("latents") or 0)) * latent_frame
    return {
        "segments": video,
        "preview": video,
        "continued": video + tail * pixels * RGB if continued else 0,  # its old part, its last frames
        "video": video,  # or a preview, while there is an older one
        "stills": job.sections * pixels * RGB if job.settings.get("save_section_frames") else 0,
        "kept latents": latents if job.settings.get("keep_latents") else 0,
        "latents": latents,
        "sampler state": STATES * SAMPLER_TENSORS * window * latent_frame,
        "section edges": EDGES * (4 * window - 3) * pixels * RGB * FLOAT32,
    }


def shortage(
    job: Job, config: Config, *, running: Sequence[Job] = (), reserve: int = RESERVE_BYTES
) -> str | None:
    """Say where there is too little room for the rest of a job, and what to do; None if there is enough.

    The rest of ``running`` jobs is kept free. Files already in a work folder count as done. An outbox on the
    state folder's file system needs no room of its own. 3 ms with 300 files in the work folder.

    Raises:
        OSError: a folder cannot be read.
    """
    # Where all fits even if the others have written nothing yet, nobody looks at what they have.
    told = _shortage(job, config, [_rest(other, config, begun=False) for other in running], reserve)
    if told is None or not running:
        return told
    return _shortage(job, config, [_rest(other, config) for other in running], reserve)


def _shortage(job: Job, config: Config, others: Sequence[Mapping[str, int]], reserve: int) -> str | None:
    here = _rest(job, config)
    state = nearest(config.state_dir)
    device = state.stat().st_dev
    reserve += sum(other["state_dir"] for other in others)
    problems = [_missing(job, "state_dir", state, here["state_dir"], reserve)]
    for key, folder in (("outbox", config.outbox), ("failed", config.failed)):
        # A silent disk is no reason to wait: until it answers, the video stays in the state folder.
        kept = sum(other[key] for other in others)
        look = partial(_missing_elsewhere, job, key, folder, here[key], kept, device)
        problems.append(within(ANSWER_SECONDS, f"room in {folder}", look, None))
    return next(filter(None, problems), None)


def _rest(job: Job, config: Config, *, begun: bool = True) -> dict[str, int]:
    """Estimate how many bytes a job still writes, by the config key of the folder.

    With ``begun`` false, as if it had written nothing: that takes no look at its files but the inputs.
    """
    parts = needed(job)
    work = config.jobs_dir / job.id
    inputs = _used(work / INPUTS)
    # What is set aside the rest of the job does not use.
    kept = sum(_used(place) for place in aside.of_job(work, CHECKPOINT)) if begun else 0
    written = _used(work) - inputs - kept if begun else 0
    return {
        "state_dir": max(sum(parts.values()) - written, 0),
        "outbox": inputs + parts["video"] + parts["stills"] + parts["kept latents"],
        "failed": inputs,
    }


def _missing_elsewhere(job: Job, key: str, folder: Path, size: int, kept: int, device: int) -> str | None:
    above = nearest(folder)
    if above.stat().st_dev == device:  # a rename moves the files there
        return None
    return _missing(job, key, above, size, kept)


def _missing(job: Job, key: str, folder: Path, size: int, reserve: int) -> str | None:
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if status.f_blocks == 0 or free >= size + reserve:  # some network file systems report no size
        return None
    kept = f" and {_readable(reserve)} are kept free" if reserve else ""
    return (
        f"{folder} has {_readable(free)} free, {job.path} needs {_readable(size)} there{kept}: "
        f"free {_readable(size + reserve - free)}, or set {key} to a larger disk"
    )


def nearest(folder: Path) -> Path:
    """Give the folder, or the nearest existing one above it."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _used(folder: Path) -> int:
    """Add up the disk usage of the files in a folder, which the worker may change meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += Path(parent, name).lstat().st_blocks * BLOCK_BYTES
    return total


def _readable(size: int) -> str:
    """Round up, so that the amount named is enough."""
    unit, name = (1 << 30, "GiB") if size >= 1 << 30 else (1 << 20, "MiB")
    return f"{math.ceil(10 * size / unit) / 10:.1f} {name}"
