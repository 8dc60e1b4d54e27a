"""Records what a worker reports on its way: steps, sections, warnings, what the device could not do."""

import logging
from datetime import UTC, datetime

from framepackd.jobs import job_warnings, pace
from framepackd.jobs.job import Job
from framepackd.jobs.store import JobStore
from framepackd.supervisor.process import Handle
from framepackd.text import duration
from framepackd.worker import messages

log = logging.getLogger(__name__)


def record(
    running: Handle, job: Job, message: messages.Message | None, store: JobStore, owner: Handle | None = None
) -> bool:
    """Record how far a job is; False for a message that says something else.

    ``owner``: the worker that computes the job, if ``running`` only makes clips of it.
    """
    match message:
        case messages.Resumed():
            running.clips = list(message.clips or [message.steps])
            in_order = _in_order(job, running.clips)
            store.resumed(job.id, steps=in_order, beyond=message.steps - in_order)
            if message.steps:
                log.info("job %s: resumed after step %d of %d", job.id, message.steps, job.steps_total)
        case messages.SetAside():
            store.note(job.id, message.text)
            log.warning("job %s: %s", job.id, message.text)
        case messages.PromptsCut():
            _note_cuts(job, message, store)
        case messages.Lowered() | messages.Uncompiled():
            _remember(job, message, store)
        case messages.StepDone():
            running.worked = True
            # The first step warms everything up: its time predicts nothing.
            if running.awaited == "step":
                running.slowest["step"] = max(message.seconds, running.slowest.get("step", 0.0))
            running.awaited = "step" if message.step < job.steps else "decode"
            running.in_section += message.seconds
            done = (owner or running).count(job, message.section, message.step)
            if owner is not None:
                store.step_beyond(job.id, seconds=message.seconds)
                return True
            running.remains = (job.steps_total - done) * message.seconds
            place = (message.section - 1) * job.steps + message.step
            seconds, beyond = message.seconds, done - place
            store.step(job.id, section=message.section, step=message.step, seconds=seconds, beyond=beyond)
        case messages.SectionDecoded():
            running.slowest["decode"] = max(message.seconds, running.slowest.get("decode", 0.0))
            running.awaited = "end" if message.section == job.sections else "step"
            if owner is None:
                store.decoded(job.id, section=message.section, seconds=message.seconds)
            _log_section(store.get(job.id), message.section, running.in_section + message.seconds)
            running.in_section = 0.0
        case messages.WaitsForClip():
            pass  # a sign of life
        case _:
            return False
    return True


def _in_order(job: Job, clips: list[int]) -> int:
    """Count the steps of the clips from the first on, up to the first that is not whole."""
    in_order = 0
    for steps in clips:
        in_order += steps
        if steps < job.steps_total // job.clips:
            break
    return in_order


def _log_section(job: Job, section: int, seconds: float) -> None:
    """Log that a section is done, how long it took in this run, and about how long the rest takes."""
    left = pace.remaining(job, None, datetime.now(UTC))
    rest = f", about {duration(left)} left" if left and section < job.sections else ""
    log.info("job %s: section %d of %d done in %s%s", job.id, section, job.sections, duration(seconds), rest)


def _note_cuts(job: Job, message: messages.PromptsCut, store: JobStore) -> None:
    """Record cut prompts, each once: a resumed job, or one of many clips, reports them again."""
    found = job_warnings.recorded(job.settings, message.cuts)
    cuts = [*job.cuts, *(cut for cut in found if cut not in job.cuts)]
    if cuts == job.cuts:
        return
    for text in job_warnings.of_cuts(cuts[len(job.cuts) :]):
        log.warning("job %s: %s", job.id, text)
    store.cut(job.id, cuts)
    job.cuts = cuts


def _remember(job: Job, message: messages.Lowered | messages.Uncompiled, store: JobStore) -> None:
    """Remember what the device could not do, for later jobs."""
    if isinstance(message, messages.Lowered):
        store.remember_level(message.key, message.level)
        log.warning("job %s: out of memory, continuing with %s", job.id, message.text)
        return
    store.remember_uncompiled(message.key, message.reason)
    log.warning(
        "job %s: cannot compile (%s): this job and later ones run uncompiled, which is slower, until the "
        "driver, torch or triton changes; compile = true tries again",
        job.id,
        message.reason,
    )
