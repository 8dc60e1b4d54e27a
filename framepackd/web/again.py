"""Makes a result again with something changed: its pictures and settings are dropped anew."""

import json
import secrets
from pathlib import Path
from typing import Any

from framepack_core.errors import RequestError
from framepack_core.request import MAX_SEED
from framepackd import files
from framepackd.delivery.results import MAX_RECORD_BYTES
from framepackd.jobs import drafts
from framepackd.settings.config import Config
from framepackd.text import rest_of_name
from framepackd.web.drop import drop_pictures
from framepackd.web.gallery import Shown

LONGEST = 120.0  # seconds
NOT_TAKEN = ("prompt", "keyframes", "seeds", "more", "save_section_frames", "keep_latents")
HOWS = ("seed", "cache", "longer", "same")


def make_again(config: Config, shown: Shown, how: str, seconds: str = "") -> str:
    """Drop a result's files once more, with another seed, without the cache, or longer; gives words for it.

    Raises:
        RequestError: it was made from what the page cannot drop, or is to be longer than a video may be.
        OSError: its files are gone, or the inbox cannot be written.
    """
    record = read_record(config, shown)
    settings = settings_of(record)
    words = "In the queue in a moment"
    if how == "seed":
        settings["seed"] = secrets.randbelow(MAX_SEED + 1)
        words += f", with seed {settings['seed']}"
    elif how == "cache":
        settings["cache"] = "none"
        words += ", without the cache"
    elif how == "longer":
        settings["seconds"] = _longer(seconds)
        words += f", {settings['seconds']:g} s long"
    elif how not in HOWS:
        raise RequestError("there is nothing that this button could do")
    drop_pictures(config, pictures_of(config, shown, record), str(record.get("prompt") or ""), settings)
    return f"{words}."


def read_record(config: Config, shown: Shown) -> dict[str, Any]:
    """Read the whole ``NAME.json`` of a result.

    Raises:
        OSError: it is gone, or no record any more.
    """
    with files.open_regular(config.outbox / f"{shown.result.path}.json") as file:
        content = file.read(MAX_RECORD_BYTES)
    try:
        record = json.loads(content)
    except ValueError as error:
        raise OSError(f"{shown.result.path}.json is damaged") from error
    if not isinstance(record, dict):
        raise OSError(f"{shown.result.path}.json is no record")
    return record


def settings_of(record: dict[str, Any]) -> dict[str, Any]:
    """Give the settings of a record, as ``NAME.toml`` would say them."""
    full = drafts.full_settings(record)
    known = set(full) - set(NOT_TAKEN)
    said: dict[str, Any] = {key: full[key] for key in sorted(known) if full[key] != ""}
    return said | ({"draft": True} if record.get("draft") is True else {})


def pictures_of(config: Config, shown: Shown, record: dict[str, Any]) -> dict[str, Path]:
    """Give the pictures that a result was made from, by what follows NAME.

    Raises:
        RequestError: it was made from something else, too.
    """
    inputs: dict[str, Any] = record.get("inputs", {})
    if "video" in inputs or record.get("keyframes"):
        raise RequestError(
            "this one was made from a video, or with keyframes: move its files back into the inbox instead"
        )
    found = {}
    for role, entry in inputs.items():
        if role in ("image", "end") or role.startswith("frame-"):
            name = shown.result.path.rpartition("/")[2] + rest_of_name(
                str(entry.get("file")), shown.result.record.name
            )
            path = shown.file(name)
            if path is None:
                raise RequestError(f"{name} does not lie beside its video any more")
            ends = {"image": "", "end": "_end"}
            found[ends.get(role, f"_{role.replace('-', '_')}")] = config.outbox / path
    if not found:
        raise RequestError("the pictures that it was made from do not lie beside it any more")
    return found


def _longer(seconds: str) -> float:
    try:
        wanted = float(seconds)
    except ValueError:
        wanted = 0.0
    if not 1 <= wanted <= LONGEST:
        raise RequestError(f"seconds must be a number from 1 to {LONGEST:g}, got {seconds!r}")
    return wanted
