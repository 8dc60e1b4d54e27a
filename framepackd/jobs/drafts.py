"""Reads of a draft what its final is made of: the same settings, with the steps and the cache that it saved.

A draft's record has ``draft`` and, under ``final``, those settings; its video's comment has them too.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from framepackd.files import open_regular
from framepackd.jobs import embedded
from framepackd.settings.job_settings import JobSettings
from framepackd.text import JOB_ID

ROLE = "draft"  # of the record among the files of a final; it is called NAME.draft.json there
SUFFIX = ".draft"
SAVED = ("steps", "cache")
MAX_RECORD_BYTES = 1 << 18
# What a final does not take over: pictures have names of their own, and it is one job.
NOT_TAKEN = ("keyframes", "seeds", "draft")


class DraftOf(TypedDict):
    """How a final's record names its draft."""

    id: str | None
    steps: object
    cache: object


@dataclass(frozen=True)
class Draft:
    """A draft whose final is asked for."""

    settings: Mapping[str, object]  # of the final
    said: DraftOf


def read(path: Path) -> Draft | None:
    """Read a record; None if it is not one of a draft.

    Raises:
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        content = file.read(MAX_RECORD_BYTES + 1)
    try:
        record = json.loads(content) if len(content) <= MAX_RECORD_BYTES else None
    except (ValueError, RecursionError):
        return None
    return of(record) if isinstance(record, dict) else None


def of(record: Mapping[str, Any]) -> Draft | None:
    """Tell from a record, or from the comment of a video, what a draft's final is made of."""
    if record.get("draft") is not True or not isinstance(record.get("final"), dict):
        return None
    identity = record.get("id")
    ours = isinstance(identity, str) and JOB_ID.fullmatch(identity)
    known = str(identity) if ours else None
    return Draft(
        full_settings(record), {"id": known, "steps": record.get("steps"), "cache": record.get("cache")}
    )


def full_settings(record: Mapping[str, Any]) -> Mapping[str, object]:
    """Give the settings of a record as ``NAME.toml`` would say them, at full quality if it is a draft's."""
    final = record.get("final")
    saved = {key: final[key] for key in SAVED if key in final} if isinstance(final, dict) else {}
    known = {key: record.get(key) for key in sorted(JobSettings.model_fields) if key not in NOT_TAKEN} | saved
    for key, wanted in (("prompts", embedded.PROMPT_KEYS), ("loras", embedded.LORA_KEYS)):
        if isinstance(entries := known[key], list):
            known[key] = [embedded.only(entry, wanted) for entry in entries]
    return {key: value for key, value in known.items() if value not in (None, [], {})}


def in_words(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Say of a draft what its final is, and of a final what its draft was."""
    for key, label in (("final", "final"), ("draft_of", "its draft")):
        if other := record.get(key):
            cache = f", cache {other['cache']}" if other["cache"] != "none" else ""
            job = f": job {other['id']}" if other.get("id") else ""
            yield label, f"{other['steps']} steps{cache}{job}"
