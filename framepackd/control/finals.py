"""Performs the command final: a draft's files, which stay in the outbox, become a job at full quality."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from framepackd import files, folders
from framepackd.delivery.deliver import name_of_input
from framepackd.intake.take import take_final
from framepackd.jobs.folder import where
from framepackd.jobs.job import Job, State
from framepackd.jobs.store import JobStore
from framepackd.settings.config import Config

Made = TypeVar("Made")
AGAIN = (State.FAILED, State.CANCELLED)  # a final that ended so may be asked for once more


def make_final(
    draft: Job, config: Config, store: JobStore, at_outbox: Callable[[Callable[[], Job | str]], Job | str]
) -> tuple[bool, str]:
    """Put the final of a delivered draft into the queue; says whether it is there now, and what was done."""
    name = f"job {draft.id} ({draft.path})"
    known = draft.settings["final"].get("id")
    final = store.find(known) if known else None
    if final is not None and final.state not in AGAIN:
        return False, f"{name} has a final: job {final.id} ({final.path}) is {final.state}"
    try:
        made = at_outbox(lambda: _take(draft, config, store))
    except OSError as error:
        reason, _ = folders.why(error, "outbox", config)
        return False, f"{name} cannot be made final: {reason}"
    if isinstance(made, str):
        return False, f"{name} cannot be made final: {made}"
    if made.delivery is not None:
        return False, f"{name} cannot be made final: {made.delivery['error']}"
    return True, f"{name}: its final is job {made.id} ({made.path})"


def _take(draft: Job, config: Config, store: JobStore) -> Job | str:
    if trouble := folders.trouble("outbox", config):
        return f"outbox {trouble}"
    sources = _sources(draft, config)
    for role, source in sources.items():
        if source.is_symlink() or not source.is_file():
            return f"{source} is missing, or no file: bring it back, or drop the picture and its text again"
        if files.sha256(source) != draft.inputs[role]["sha256"]:
            return f"{source} has changed since: drop the files into the inbox, as a new job"
    return take_final(draft, sources, config, store)


def _sources(draft: Job, config: Config) -> dict[str, Path]:
    """Give where a draft's files were delivered, by role."""
    folder, stem = where(draft)
    return {
        role: config.outbox / folder / f"{stem}{name_of_input(draft, role, entry['file'], State.DONE)}"
        for role, entry in draft.inputs.items()
    }
