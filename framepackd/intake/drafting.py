"""Makes a draft of a job's settings cheap, and tells from dropped files that they ask for a draft's final."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framepackd.inbox.inspect import read_comment
from framepackd.jobs import drafts, embedded
from framepackd.settings.config import Config
from framepackd.settings.job_settings import JobSettings, parse_settings


def as_draft(settings: JobSettings, config: Config) -> tuple[JobSettings, dict[str, Any] | None]:
    """Save steps and cache if a draft is wanted; gives the settings, and what is left to the final."""
    if not settings.draft:
        return settings, None
    final = {key: getattr(settings, key) for key in drafts.SAVED}
    saved = {"steps": min(settings.steps, config.draft.steps), "cache": config.draft.cache}
    return settings.model_copy(update=saved), final


def draft_of(record: Path | None, recipe: Path | None) -> drafts.Draft | None:
    """Give the draft whose record, or else whose video, was dropped again with its pictures."""
    if record is not None:
        return drafts.read(record)
    return drafts.of(embedded.read(read_comment(recipe)) or {}) if recipe is not None else None


def of_draft(draft: drafts.Draft | None, name: str) -> dict[str, Any]:
    """Give the settings that a final takes over, checked.

    Raises:
        RequestError: somebody has changed the record, and one of them is wrong.
    """
    return parse_settings(draft.settings, f"the record of the draft of {name}") if draft else {}


def of_own_file(own: Mapping[str, Any], draft: drafts.Draft | None) -> dict[str, Any]:
    """Give what a job's own file says: of a final it is the draft's, and its seed stays."""
    if draft is None:
        return dict(own)
    return {key: value for key, value in own.items() if key != "seed"} | {"draft": False, "seeds": 1}
