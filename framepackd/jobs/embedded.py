"""Writes into a video how it was made, and reads the settings from such a video.

It holds those settings that the bits depend on, in a fixed order, so that the same job gives the same file:
no id, no time, no path.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framepack_core.errors import RequestError
from framepack_core.models.registry import ModelSpec, Source
from framepack_core.request import GenerationSettings
from framepackd.jobs.job import Job
from framepackd.settings.job_settings import parse_settings
from framepackd.text import printable

MADE_BY = ("made_by", "framepackd")  # marks a comment as ours
MAX_TITLE = 100  # characters
PROMPT_KEYS, LORA_KEYS = ("from", "to", "text"), ("file", "weight", "allow_partial")
_SETTINGS = (
    *("prompt", "model", "seed"),
    *(key for key in GenerationSettings.model_fields if key != "resolution"),  # width and height say more
    *("crf", "loras"),
)


def tags(job: Job, spec: ModelSpec) -> dict[str, str]:
    """Give the tags of a job's video: ``title`` for players, ``comment`` as JSON; {} if it wants none."""
    if not job.settings.get("embed_metadata", True):
        return {}
    said: dict[str, Any] = dict([MADE_BY])
    said |= {key: job.settings[key] for key in _SETTINGS if job.settings.get(key) is not None}
    said["prompts"] = [only(entry, PROMPT_KEYS) for entry in said.get("prompts", ())]
    said["loras"] = [only(entry, (*LORA_KEYS, "sha256")) for entry in said.get("loras", ())]
    said |= {key: job.settings[key] for key in ("draft", "draft_of") if job.settings.get(key)}
    if job.settings.get("draft"):  # no id, as above: of the final, what it does not save
        said["final"] = only(job.settings["final"], ("steps", "cache"))
    if said.get("draft_of"):
        said["draft_of"] = only(said["draft_of"], ("steps", "cache"))
    if job.settings.get("more") is not None:
        said["more"] = job.settings["more"]
    said["model_sources"] = {
        name: _named(getattr(spec, name)) for name in ("transformer", "base", "image_encoder")
    }
    title = printable(" ".join(job.settings["prompt"].split()))[:MAX_TITLE]
    return {"title": title, "comment": json.dumps(said, ensure_ascii=False)}


def read(comment: str | None) -> dict[str, Any] | None:
    """Read a comment; None if framepackd did not write it."""
    try:
        said = json.loads(comment or "")
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) and MADE_BY in said.items() else None


def settings_of(said: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Give the settings that a comment names; keys that this version does not know are left out.

    Raises:
        RequestError: one of them is wrong; the text names key, value, range and ``origin``.
    """
    known = {key: said[key] for key in _SETTINGS if key in said}
    for key, wanted in (("prompts", PROMPT_KEYS), ("loras", LORA_KEYS)):
        if isinstance(known.get(key), list):
            known[key] = [only(entry, wanted) for entry in known[key]]
    try:
        return parse_settings(known, f"what {origin} says of how it was made")
    except RequestError as error:
        raise RequestError(f"{error}; leave the video out, or say otherwise in a NAME.toml") from error


def only(entry: object, keys: tuple[str, ...]) -> object:
    """Keep these keys of an entry of prompts or LoRAs: what is recorded has more than the settings."""
    return {key: entry[key] for key in keys if key in entry} if isinstance(entry, dict) else entry


def _named(source: Source) -> str:
    """Name a repository with its revision, and a local folder without its path."""
    return Path(source.location).name if source.is_local else str(source)
