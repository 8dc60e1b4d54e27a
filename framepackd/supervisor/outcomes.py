"""Records what the end of a run means for its job: done, in the queue again, one attempt less, or failed."""

import logging
from typing import Any

from framepack_core.models.registry import ModelSpec
from framepackd.jobs.job import Job, State
from framepackd.jobs.store import JobStore
from framepackd.settings import loras
from framepackd.worker import messages

log = logging.getLogger(__name__)


def put_back(job: Job, store: JobStore, why: str) -> None:
    """Queue a job again, which loses nothing by it."""
    store.requeue(job.id, why)
    log.warning("job %s: back in the queue: %s", job.id, why)


def blame_device(job: Job, store: JobStore, error: str) -> str:
    """Queue a job again whose worker failed before its first step; gives the first line of its error.

    Twice in a row it is the device, not the job.
    """
    first = error.partition("\n")[0]
    store.requeue(job.id, first)
    log.error("job %s: back in the queue: the device failed: %s", job.id, first)
    return first


def count_attempt(job: Job, store: JobStore, error: str, limit: int) -> None:
    """Queue a job again, or let it fail if that was its last attempt."""
    attempts = store.count_attempt(job.id, error, max_attempts=limit)
    log.warning("job %s: attempt %d of %d: %s", job.id, attempts, limit, error)


def fail(job: Job, store: JobStore, error: str) -> None:
    """Let a job fail."""
    log.error("job %s: failed: %s", job.id, error)
    store.decide(job.id, State.FAILED, error=error)


def how_made(job: Job, made: messages.Finished, spec: ModelSpec) -> dict[str, Any]:
    """Give the columns of a job's row that say how its video was made."""
    merged = job.settings.get("loras", [])
    if made.loras:
        merged = loras.with_counts(merged, made.loras)
    continues = job.settings.get("continues")
    if continues is not None:
        continues = continues | {"encoded_anew": made.encoded_anew}
    sources = ("transformer", "base", "image_encoder", *(("mag_ratios",) if spec.mag_ratios else ()))
    return {
        "settings": job.settings | {"loras": merged, "continues": continues},
        "timings": made.timings,
        "versions": made.versions,
        "computation": made.computation,
        "quality": made.quality,
        "model_sources": {name: str(getattr(spec, name)) for name in sources},
    }
