"""Builds the pieces of SQL that queries and updates of jobs share."""

import json
from typing import Any

from sqlalchemy import case, func, literal, select, text, update

from framepackd.jobs.job import Decision, HistoryEntry, Job, State, utc_now
from framepackd.text import LAST

CANCELLED: Decision = {"state": State.CANCELLED, "error": "cancelled by framepackd cancel"}


def variation_of(name: str) -> Any:
    """Match the names of the variations of a job."""
    return starts_with(Job.name, f"{name}_seed_")


def starts_with(column: Any, start: str) -> Any:
    """Match the start of a column by its index, which LIKE would not use."""
    return (column >= start) & (column < start + LAST)


# Unary plus: else SQLite searches the greatest seq by walking backwards through the whole table.
TAKEN_AS = text("""
    WITH asked AS (
        SELECT json_extract(value, '$[0]') AS folder, json_extract(value, '$[1]') AS name
        FROM json_each(:names)
    ), latest AS (
        SELECT folder, name,
            (SELECT max(+seq) FROM job WHERE name = asked.name AND folder = asked.folder) AS same,
            (SELECT max(+seq) FROM job WHERE name >= asked.name || '_seed_'
                AND name < asked.name || '_seed_' || :after AND folder = asked.folder) AS variation
        FROM asked
    )
    SELECT latest.folder, latest.name, job.id
    FROM latest JOIN job ON job.seq = max(coalesce(same, 0), coalesce(variation, 0))
""")


def naming_its_final(draft: str, final: str) -> Any:
    """Have a draft's settings name its final."""
    named = func.json_set(Job.settings, "$.final.id", final)
    is_draft = func.json_extract(Job.settings, "$.draft") == 1
    return update(Job).where(Job.id == draft, is_draft).values(settings=named)


RUNNABLE = (Job.state == State.QUEUED, Job.delivery.is_(None))
IN_ORDER = (Job.position, Job.seq)


def following(what: Any) -> Any:
    """Select the job that is to run next."""
    return select(what).where(*RUNNABLE).order_by(*IN_ORDER).limit(1)


def unless_cancelled(delivery: Decision) -> Any:
    """Give a decision, or CANCELLED for a job that was cancelled meanwhile."""
    return case((Job.cancel.is_(None), as_json(delivery)), else_=as_json(CANCELLED))


def as_json(value: Decision | None) -> Any:
    """Give a decision as the column ``delivery`` holds it."""
    return literal(value, Job.delivery.type)


def entry(state: State, note: str) -> HistoryEntry:
    """Make an entry of a job's history."""
    return {"at": utc_now(), "state": state.value, "note": note}


def with_entry(state: State, note: str) -> Any:
    """Append an entry to the history."""
    return func.json_insert(Job.history, "$[#]", func.json(json.dumps(entry(state, note))))


def smoothed(column: Any, seconds: float) -> Any:
    """Move the average of a column a fifth of the way to the newest value."""
    return func.coalesce(column + (seconds - column) * 0.2, seconds)
