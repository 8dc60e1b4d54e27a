"""Performs the command final: a draft's files, which stay in the outbox, become a job at full quality."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

from framepackd import files, folders
from framepackd.delivery.deliver import name_of_input
from framepackd.delivery.deliveries import settle
from framepackd.intake import take_back
from framepackd.intake.take import adopt_leftovers, take_final
from framepackd.jobs.folder import where
from framepackd.jobs.job import Job, State
from framepackd.jobs.store import JobStore
from framepackd.settings.config import Config

Outcome = tuple[bool, str]  # whether it was done, and what, in words
AGAIN = (State.FAILED, State.CANCELLED)  # a final that ended so may be asked for once more


def make_final(
    draft: Job,
    config: Config,
    store: JobStore,
    at_outbox: Callable[[Callable[[], Outcome]], Outcome],
    *,
    alone: bool,
) -> Outcome:
    """Put the final of a delivered draft into the queue; says whether it is there now, and what was done.

    ``at_outbox`` runs what uses the outbox; ``alone``: no daemon runs that would deliver a failed job.
    """
    name = f"job {draft.id} ({draft.path})"
    try:
        return at_outbox(lambda: _make(name, draft, config, store, alone=alone))
    except OSError as error:
        reason, _ = folders.why(error, "outbox", config)
        return False, f"{name} cannot be made final: {reason}"


def _make(name: str, draft: Job, config: Config, store: JobStore, *, alone: bool) -> Outcome:
    adopt_leftovers(config, store)  # one that was being taken in when its daemon died is the final
    known = store.get(draft.id).settings["final"].get("id")
    final = store.find(known) if known else None
    gone = final is not None and final.state == State.DONE and not Path(final.output or "").is_file()
    if final is not None and final.state not in AGAIN and not gone:
        return False, f"{name} has a final: job {final.id} ({final.path}) is {final.state}"
    sources, trouble = _sources(draft, config), folders.trouble("outbox", config)
    if obstacle := f"outbox {trouble}" if trouble else _changed(draft, sources):
        return False, f"{name} cannot be made final: {obstacle}"
    final = take_final(draft, sources, config, store)
    if final.delivery is not None:
        if alone:
            with contextlib.suppress(OSError):  # then a daemon tries it again
                settle(final, config, store, take_back.bring_back)
        return False, f"{name} cannot be made final: {final.delivery['error']}"
    return True, f"{name}: its final is job {final.id} ({final.path})"


def _changed(draft: Job, sources: Mapping[str, Path]) -> str | None:
    """Say which file of a draft is not as it was; None if all are."""
    for role, source in sources.items():
        if source.is_symlink() or not source.is_file():
            return f"{source} is missing, or no file: bring it back, or drop the picture and its text again"
        if files.sha256(source) != draft.inputs[role]["sha256"]:
            return f"{source} has changed since: drop the files into the inbox, as a new job"
    return None


def _sources(draft: Job, config: Config) -> dict[str, Path]:
    """Give where a draft's files were delivered, by role."""
    folder, stem = where(draft)
    return {
        role: config.outbox / folder / f"{stem}{name_of_input(draft, role, entry['file'], State.DONE)}"
        for role, entry in draft.inputs.items()
    }
