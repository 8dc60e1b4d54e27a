"""Finds hidden, half-written files of ours that a crash left in a folder, and says how to remove them."""

import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from framepackd.files import PART_PREFIX
from framepackd.inbox.naming import name_of
from framepackd.jobs.store import JobStore
from framepackd.problems import Problem
from framepackd.settings.config import Config
from framepackd.text import JOB_ID, printable, shell_word

PART = re.compile(
    rf"{re.escape(PART_PREFIX)}(?:(?:back-)?(?P<job>{JOB_ID.pattern})-)?(?P<name>.+)\.part", re.DOTALL
)
ONE_BY_ONE = 3  # problems for a folder; more files share one
FOLDERS = 10
ABANDONED_SECONDS = 86400.0  # after these a file that the page was writing counts as forgotten


class _Part(NamedTuple):
    path: Path
    job: str | None  # None: a file that the page was writing
    name: str
    since: float


def forgotten(
    parts: Mapping[str, float], config: Config, store: JobStore | None, now: float | None = None
) -> list[Problem]:
    """Report hidden files in the inbox, as a scan found them, that belong to no job.

    A file of a job that was being taken in belongs to none if neither the database nor a work folder knows
    the job: the state folder is another one, or an older backup. Without a database ``store`` is None.

    Raises:
        StoreError: the database cannot be used.
    """
    if not parts:
        return []
    by_folder: dict[Path, list[_Part]] = defaultdict(list)
    for part in _belonging_to_nothing(parts, config, store, time.time() if now is None else now):
        by_folder[part.path.parent].append(part)
    texts = [text for folder in sorted(by_folder)[:FOLDERS] for text in _texts(folder, by_folder[folder])]
    if len(by_folder) > FOLDERS:
        texts.append(f"{len(by_folder) - FOLDERS} more folders of {config.inbox} hold such hidden files")
    return [Problem("forgotten", printable(text)) for text in texts]


def left_in(root: Path, store: JobStore) -> list[Problem]:
    """Report unfinished hidden copies in the outbox or the failed folder that belong to unknown jobs.

    Raises:
        StoreError: the database cannot be used.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for folder, names, here in os.walk(root):
        names[:] = [name for name in names if not name.startswith(".")]
        for name in here:
            part = PART.fullmatch(name)
            if part is not None and part["job"] is not None:
                found[part["job"]].append(str(Path(folder, name)))
    known = store.states() if found else {}
    paths = sorted(path for job, of_job in found.items() if job not in known for path in of_job)
    if not paths:
        return []
    some = " ".join(map(shell_word, paths[:ONE_BY_ONE])) + (" ..." if len(paths) > ONE_BY_ONE else "")
    copies = "an unfinished copy" if len(paths) == 1 else f"{len(paths)} unfinished copies"
    text = (
        f"{root} holds {copies} of unknown jobs: bring back framepackd.db and jobs/ from a backup, or remove "
        f"what was copied: rm {some}"
    )
    return [Problem("forgotten", printable(text))]


def _belonging_to_nothing(
    parts: Mapping[str, float], config: Config, store: JobStore | None, now: float
) -> Iterator[_Part]:
    left = []
    for path, since in sorted(parts.items()):
        found = PART.fullmatch(name_of(path))
        if found is None:
            continue
        part = _Part(config.inbox / path, found["job"], found["name"], since)
        # In this order: a job that is taken in gets a work folder, then a row, then has no hidden files.
        if part.job is not None:
            left += [] if os.path.lexists(config.jobs_dir / part.job) else [part]
        elif now - since > ABANDONED_SECONDS:
            yield part
    known = store.states() if left and store else {}
    yield from (part for part in left if part.job not in known and os.path.lexists(part.path))


def _texts(folder: Path, parts: list[_Part]) -> Iterator[str]:
    if len(parts) <= ONE_BY_ONE:
        yield from map(_text, parts)
        return
    yield (
        f"{folder} holds {len(parts)} hidden files of unknown jobs, since "
        f"{_time(min(part.since for part in parts))}: give them their names again to have them taken in, or "
        f"remove them, for example {_remedy(parts[0])}"
    )


def _text(part: _Part) -> str:
    if part.job is None:
        return (
            f"{part.path} was left half-written by the page, since {_time(part.since)}: drop the file "
            f"again, and remove this one: {_remedy(part)}"
        )
    return (
        f"{part.path} was being taken in as job {part.job}, which is unknown, since {_time(part.since)}: "
        f"to have it taken in again, give it its name: {_remedy(part)}"
    )


def _remedy(part: _Part) -> str:
    """Give the command that removes or renames a file, printable whatever the file is called."""
    path = shell_word(str(part.path))
    if part.job is None:
        return f"rm {path}"
    return f"mv -n {path} {shell_word(str(part.path.with_name(part.name)))}"


def _time(since: float) -> str:
    return datetime.fromtimestamp(since, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
