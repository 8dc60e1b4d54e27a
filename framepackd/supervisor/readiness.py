"""Looks for what must be there before a job starts: its files, its model, its GPU."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framepack_core.errors import FramePackError
from framepack_core.models import model_files
from framepack_core.models.registry import BUNDLED
from framepackd.jobs.database import StoreError
from framepackd.jobs.folder import INPUTS
from framepackd.jobs.job import Job
from framepackd.jobs.store import JobStore
from framepackd.problems import Problem
from framepackd.settings.config import Config
from framepackd.supervisor.space import shortage

NVIDIA = Path("/proc/driver/nvidia")  # there while a driver is loaded
SHOWN_JOBS = 5  # of those that a problem names


def gpu_seen() -> bool:
    """Say whether the kernel has an NVIDIA driver, whatever torch makes of it."""
    return NVIDIA.exists()


def is_gpu_expected(model: str, config: Config) -> bool:
    """Say whether ``auto`` is a GPU and nothing else: the CPU would take days with this model."""
    if model in BUNDLED:
        return False
    try:
        used = config.database.exists() and JobStore(config.database, read_only=True).gpu_used()
    except StoreError:  # the daemon says what is wrong with it
        used = False
    return used or gpu_seen()


def missing_model(job: Job, config: Config) -> str | None:
    """Say which file of the job's model is missing or not what it should be; None if all are here and fit."""
    try:
        model_files.look(config.spec(job.settings["model"]))
    except FramePackError as error:
        return str(error)
    except (KeyError, ValueError, OSError):  # not in the config any more: the job says so
        return None
    return None


def missing_room(job: Job, config: Config) -> str | None:
    """Say where there is too little room on a disk for the job; None if there is enough."""
    try:
        return shortage(job, config)
    except OSError as error:
        return f"{error.filename} cannot be looked at ({error.strerror}): check that its disk is there"


def without_files(store: JobStore, config: Config) -> dict[str, str]:
    """Say of which queued jobs the files are not in their work folders, by id, and what to do about each."""
    return {
        job_id: (
            f"its files are not in {config.jobs_dir / job_id}: bring back jobs/ from the same backup as "
            f"{config.database.name}, or framepackd cancel it and drop the files again"
        )
        for job_id, inputs in store.queued_inputs()
        if not has_files(job_id, inputs, config)
    }


def has_files(job_id: str, inputs: Mapping[str, Any], config: Config) -> bool:
    """Say whether all that was dropped for a job is in its work folder."""
    folder = config.jobs_dir / job_id / INPUTS
    return all(os.path.lexists(folder / entry["file"]) for entry in inputs.values())


def problem_without_files(without: Mapping[str, str], config: Config) -> Problem | None:
    """Tell of all such jobs together; None if there are none."""
    if not without:
        return None
    some = _named(without)
    jobs = "1 job waits" if len(without) == 1 else f"{len(without)} jobs wait"
    return Problem(
        "work-folders",
        f"{jobs} for files that are not in {config.jobs_dir} ({some}): bring back jobs/ from the same backup "
        f"as {config.database.name}, or framepackd cancel what is made already or is not to be made",
    )


def problem_of_other_device(waiting: Mapping[str, str]) -> Problem | None:
    """Tell of the jobs that wait for the device they were begun on; of one in its own words."""
    if not waiting:
        return None
    if len(waiting) == 1:
        ((job_id, reason),) = waiting.items()
        return Problem("other-device", f"job {job_id} waits: {reason}")
    return Problem(
        "other-device",
        f"{len(waiting)} jobs wait for the device that they were begun on, a GPU or the CPU "
        f"({_named(waiting)}): bring it back (device under [gpu]) and restart, or begin anew with "
        "framepackd retry JOB --anew, which keeps what was made aside",
    )


def _named(jobs: Mapping[str, str]) -> str:
    """Name some jobs by their ids."""
    return ", ".join(list(jobs)[:SHOWN_JOBS]) + (" ..." if len(jobs) > SHOWN_JOBS else "")
