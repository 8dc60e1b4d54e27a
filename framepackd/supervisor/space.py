"""Looks for room on the disks, before a job starts and while it runs.

An upper estimate: a video that does not fit is better told of before its night than in it.
"""

import contextlib
import math
import os
from functools import partial
from pathlib import Path

from framepack_core.media.extend import frames_of, tail_latents
from framepackd.apart import within
from framepackd.jobs import aside
from framepackd.jobs.folder import CHECKPOINT, INPUTS
from framepackd.jobs.job import Job
from framepackd.settings.config import Config

# Left free beside the jobs in the state folder: a few MiB for the database and its log, the rest for the
# system's log and for what is dropped into an inbox on the same disk, a hundred photos.
RESERVE_BYTES = 512 << 20

FLOAT32, RGB = 4, 3  # bytes; channels
LATENT_CHANNELS, LATENT_PIXELS = 16, 8  # a latent stands for 8x8 pixels
SAMPLER_TENSORS = 6  # of a section: up to four of the solver, two of the step cache
STATES = 3  # two are kept while the next is written
EDGES = 2  # of the section just decoded and of the one before
# The video's share of its raw frames, falling with crf. White noise took 0.51 at crf 0, 0.46 at 1, 0.26 at
# 16, 0.10 at 30; at 16 a photo with heavy grain took 0.10, an ordinary video 0.02.
NOISE_SHARE, WORST_CRF = 0.52, 52
ANSWER_SECONDS = 1.0  # for a disk to tell its room
BLOCK_BYTES = 512  # the unit of st_blocks, whatever the file system's is


def needed(job: Job) -> dict[str, int]:
    """Estimate, part by part, to how many bytes a job's work folder grows; without the inputs."""
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


def shortage(job: Job, config: Config, *, reserve: int = RESERVE_BYTES) -> str | None:
    """Say where there is too little room for the rest of a job, and what to do; None if there is enough.

    What the job has in its work folder already counts as done. An outbox on the state folder's file system
    needs nothing more. 3 ms with 300 files in the work folder.

    Raises:
        OSError: a folder cannot be looked at.
    """
    parts = needed(job)
    work = config.jobs_dir / job.id
    inputs = _used(work / INPUTS)
    delivered = inputs + parts["video"] + parts["stills"] + parts["kept latents"]
    kept = sum(_used(place) for place in aside.of_job(work, CHECKPOINT))  # of no use to what is to come
    rest = max(sum(parts.values()) - (_used(work) - inputs - kept), 0)
    state = _nearest(config.state_dir)
    device = state.stat().st_dev
    problems = [_missing(job, "state_dir", state, rest, reserve)]
    for key, folder, size in (("outbox", config.outbox, delivered), ("failed", config.failed, inputs)):
        # A disk that does not answer is no reason to wait: until it does, the state folder keeps the video.
        look = partial(_missing_elsewhere, job, key, folder, size, device)
        problems.append(within(ANSWER_SECONDS, f"room in {folder}", look, None))
    return next(filter(None, problems), None)


def _missing_elsewhere(job: Job, key: str, folder: Path, size: int, device: int) -> str | None:
    nearest = _nearest(folder)
    if nearest.stat().st_dev == device:  # a rename moves the files there
        return None
    return _missing(job, key, nearest, size, 0)


def _missing(job: Job, key: str, folder: Path, size: int, reserve: int) -> str | None:
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if status.f_blocks == 0 or free >= size + reserve:  # some network file systems do not tell their size
        return None
    kept = f" and {_readable(reserve)} are kept free" if reserve else ""
    return (
        f"{folder} has {_readable(free)} free, {job.path} needs {_readable(size)} there{kept}: "
        f"free {_readable(size + reserve - free)}, or set {key} to a larger disk"
    )


def _nearest(folder: Path) -> Path:
    """Give the folder, or the one above it in which it will be made."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _used(folder: Path) -> int:
    """Add up what the files in a folder take on the disk; the worker may be at work in it."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += Path(parent, name).lstat().st_blocks * BLOCK_BYTES
    return total


def _readable(size: int) -> str:
    """Round up, so that what is asked for is enough."""
    unit, name = (1 << 30, "GiB") if size >= 1 << 30 else (1 << 20, "MiB")
    return f"{math.ceil(10 * size / unit) / 10:.1f} {name}"
