"""Writes into a video how it was made, and reads such a video as settings again.

It holds what the bits depend on and a person can set, in a fixed order, so that the same job gives the same
file: no id, no time, no place on a disk.
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

MADE_BY = ("made_by", "framepackd")  # by this a comment is known as ours
MAX_TITLE = 100  # characters
_OF_A_PROMPT, _OF_A_LORA = ("from", "to", "text"), ("file", "weight", "allow_partial")
_SETTINGS = (
    *("prompt", "model", "seed"),
    *(key for key in GenerationSettings.model_fields if key != "resolution"),  # width and height say more
    *("crf", "loras"),
)


def tags(job: Job, spec: ModelSpec) -> dict[str, str]:
    """Give the tags of a job's video: ``title`` for players, ``comment`` as JSON; none if none are wanted."""
    if not job.settings.get("embed_metadata", True):
        return {}
    said: dict[str, Any] = dict([MADE_BY])
    said |= {key: job.settings[key] for key in _SETTINGS if job.settings.get(key) is not None}
    said["prompts"] = [_only(entry, _OF_A_PROMPT) for entry in said.get("prompts", ())]
    said["loras"] = [_only(entry, (*_OF_A_LORA, "sha256")) for entry in said.get("loras", ())]
    if job.settings.get("more") is not None:
        said["more"] = job.settings["more"]
    said["model_sources"] = {
        name: _named(source)
        for name, source in (
            ("transformer", spec.transformer),
            ("base", spec.base),
            ("image_encoder", spec.image_encoder),
        )
    }
    title = printable(" ".join(job.settings["prompt"].split()))[:MAX_TITLE]
    return {"title": title, "comment": json.dumps(said, ensure_ascii=False)}


def read(comment: str | None) -> dict[str, Any] | None:
    """Give what a comment says, if framepackd wrote it."""
    try:
        said = json.loads(comment or "")
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) and MADE_BY in said.items() else None


def settings_of(said: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Give the settings that a comment names; what another version has added is passed over.

    Raises:
        RequestError: one of them is wrong; names key, value, range and ``origin``.
    """
    known = {key: said[key] for key in _SETTINGS if key in said}
    for key, wanted in (("prompts", _OF_A_PROMPT), ("loras", _OF_A_LORA)):
        if isinstance(known.get(key), list):
            known[key] = [_only(entry, wanted) if isinstance(entry, dict) else entry for entry in known[key]]
    try:
        return parse_settings(known, f"what {origin} says of how it was made")
    except RequestError as error:
        raise RequestError(f"{error}; leave the video out, or say otherwise in a NAME.toml") from error


def _only(entry: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: entry[key] for key in keys if key in entry}


def _named(source: Source) -> str:
    """Name a repository with its revision; of a folder of one's own its name alone."""
    return Path(source.location).name if source.is_local else str(source)
