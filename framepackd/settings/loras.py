"""Finds a job's LoRAs below ``lora_dir``, and records what was used of them."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NotRequired, TypedDict

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StrictBool

from framepack_core.errors import ModelError, RequestError
from framepack_core.mistakes import shown
from framepack_core.models import lora_files
from framepack_core.models.registry import ModelSpec
from framepack_core.request import Lora, Number

log = logging.getLogger(__name__)

SUFFIX = ".safetensors"
MAX_LORAS = 16  # of a job
MAX_NAMED = 10  # files in a message
MAX_LISTED = 10_000  # files of the folder


def _below(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.suffix.lower() != SUFFIX or "\0" in name:
        raise ValueError(f"must be the path of a {SUFFIX} file below lora_dir, without .., got {shown(name)}")
    return str(path)


class LoraSetting(BaseModel):
    """A LoRA, as ``loras`` in the settings names it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    file: Annotated[str, AfterValidator(_below)]
    weight: Number = Field(1.0, ge=-4, le=4)
    allow_partial: StrictBool = False  # use it even if some keys match no layer of the model


def _by_name(value: object) -> object:
    return {"file": value} if isinstance(value, str) else value


def _each_once(loras: list[LoraSetting]) -> list[LoraSetting]:
    files = [entry.file for entry in loras]
    twice = next((file for file in files if files.count(file) > 1), None)
    if twice is not None:
        raise ValueError(f"must name each file once: {twice} is there twice, add the weights up")
    return loras


LoraSettings = Annotated[
    list[Annotated[LoraSetting, BeforeValidator(_by_name)]],
    Field(max_length=MAX_LORAS),
    AfterValidator(_each_once),
]


def find(name: str, lora_dir: Path) -> Path:
    """Give the file of a LoRA.

    Raises:
        RequestError: it is not there, or lies elsewhere.
    """
    try:
        root = lora_dir.resolve()
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise RequestError(f"loras: {name} is a link out of {lora_dir}: put the file itself there")
        there = path.is_file()
    except (OSError, RuntimeError):  # a name that no file can have, or links in a circle
        there = False
    if not there:
        raise RequestError(
            f"loras: there is no {name} in {lora_dir} ({listing(lora_dir)}): put it there, or correct the "
            "name, and drop the files again"
        )
    return path


def listing(lora_dir: Path) -> str:
    """List the LoRAs in a folder for a message, at most MAX_NAMED of them."""
    try:
        if not lora_dir.is_dir():
            return "there is no such folder"
    except OSError as error:  # a folder above is closed, or its disk fails
        return f"it cannot be read: {error.strerror}"
    found = names(lora_dir)
    more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    return f"there are {', '.join(found[:MAX_NAMED])}{more}" if found else f"no {SUFFIX} file is there"


def names(lora_dir: Path) -> list[str]:
    """Name the LoRAs that are there; none where the folder cannot be read."""
    try:
        return sorted(islice(_names(lora_dir), MAX_LISTED)) if lora_dir.is_dir() else []
    except OSError:
        return []


def _names(lora_dir: Path) -> Iterator[str]:
    for folder, _, files in os.walk(lora_dir):
        here = Path(folder).relative_to(lora_dir)
        seen = (file for file in files if not file.startswith("."))  # macOS leaves a ._file beside each
        yield from (str(here / file) for file in seen if file.lower().endswith(SUFFIX))


def opened(entry: LoraSetting, lora_dir: Path) -> Lora:
    """Find the file of a LoRA setting and give it as the engine takes it.

    Raises:
        RequestError: its file is not there, or lies elsewhere.
    """
    return Lora(file=find(entry.file, lora_dir), weight=entry.weight, allow_partial=entry.allow_partial)


class LoraRecord(TypedDict):
    """What a job's settings record of a LoRA."""

    file: str  # below lora_dir
    weight: float
    sha256: str
    allow_partial: NotRequired[bool]
    matched: NotRequired[int]  # keys; known once they were compared with the model's files
    unmatched: NotRequired[int]
    keys: NotRequired[int]


def take_in(chosen: Sequence[LoraSetting], lora_dir: Path, spec: ModelSpec) -> list[LoraRecord]:
    """Check a job's LoRAs, and give what is recorded of them.

    Recorded are file, weight, SHA-256 and how many keys match the model. The last is known only if the
    model's files are here; else the worker adds it.

    Raises:
        RequestError: a file is not there, or does not fit the model.
        OSError: a file cannot be read.
    """
    loras = [opened(entry, lora_dir) for entry in chosen]
    entries: list[LoraRecord] = []
    for entry, found in zip(chosen, loras, strict=True):
        record: LoraRecord = {
            "file": entry.file,
            "weight": entry.weight,
            "sha256": lora_files.sha256(found.file),
        }
        entries.append({**record, "allow_partial": True} if entry.allow_partial else record)
    try:
        fits = lora_files.fit_all(loras, spec)
    except ModelError:
        return entries
    for record, fit in zip(entries, fits, strict=True):
        log.log(logging.WARNING if fit.unmatched else logging.INFO, "LoRA %s: %s", record["file"], fit.text)
    return with_counts(entries, [fit.counts for fit in fits])


def with_counts(entries: Iterable[LoraRecord], counts: Iterable[Mapping[str, int]]) -> list[LoraRecord]:
    """Add to each record of a LoRA how many of its keys match."""
    return [
        {**entry, "matched": count["matched"], "unmatched": count["unmatched"], "keys": count["keys"]}
        for entry, count in zip(entries, counts, strict=True)
    ]


def requested(settings: Mapping[str, Any], lora_dir: Path) -> tuple[Lora, ...]:
    """Give a recorded job's LoRAs as the engine takes them; it checks that their content is the same."""
    return tuple(
        Lora(
            file=lora_dir / entry["file"],
            weight=entry["weight"],
            sha256=entry["sha256"],
            allow_partial=entry.get("allow_partial", False),
        )
        for entry in settings.get("loras", ())
    )


def decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Give a job's settings with LoRAs by content and weight: their files' names do not change the result."""
    merged = sorted((entry["sha256"], entry["weight"]) for entry in settings.get("loras", ()))
    others = {key: value for key, value in settings.items() if key != "loras"}
    return others | ({"loras": merged} if merged else {})


def in_words(entry: Mapping[str, Any]) -> str:
    """Describe a recorded LoRA in one line."""
    line = f"{entry['file']}, weight {entry['weight']:g}"
    if "matched" in entry:
        # An older version recorded no "keys", and did not count those for text encoders.
        line += f", matched {entry['matched']} of {entry.get('keys', entry['matched'] + entry['unmatched'])}"
    return line
