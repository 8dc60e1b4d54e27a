"""Turns the page's form into files in the inbox, and says where their job stands."""

import contextlib
import json
import re
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from framepack_core.errors import RequestError
from framepack_core.media import heif
from framepackd import files, folders
from framepackd.control import client
from framepackd.inbox.naming import is_picture, picture_types
from framepackd.jobs.job import ENDED
from framepackd.jobs.report import Record
from framepackd.settings.config import Config
from framepackd.settings.decoding import MAX_PROMPT_BYTES
from framepackd.settings.job_settings import MAX_SETTINGS_BYTES, parse_settings

FOLDER = "web"  # below the inbox, and so below the outbox
MAX_WORDS = 40  # characters of the prompt in a NAME
UNFINISHED = f"{files.PART_PREFIX}drop-"  # the daemon hides files of its own in the same folder
UNFINISHED_SECONDS = 3600  # nobody copies a picture for longer
Setting = str | float | bool | list[dict[str, "Setting"]]


def drop(
    config: Config,
    *,
    picture: Path,
    prompt: str,
    settings: dict[str, Setting],
    end_picture: Path | None = None,
) -> str:
    """Put a job's files into the inbox, all or none; gives its NAME, which no other job has.

    ``settings`` are those of ``NAME.toml``; the daemon checks them again, with everything else.

    Raises:
        RequestError: a setting or the prompt is wrong, or a picture is of a kind that is not read.
        OSError: a picture is gone, or the inbox cannot be written.
    """
    ends = {} if end_picture is None else {"_end": end_picture}
    return drop_pictures(config, {"": picture, **ends}, prompt, settings)


def drop_pictures(
    config: Config, pictures: Mapping[str, Path], prompt: str, settings: dict[str, Setting]
) -> str:
    """Put a job's files into the inbox, its pictures by what follows NAME, as ``drop`` does.

    Raises:
        RequestError, OSError: as ``drop``.
    """
    (name,) = drop_many(config, [Dropped(pictures, prompt, settings)])
    return name


@dataclass(frozen=True)
class Dropped:
    """What becomes one job: its pictures by what follows NAME, its sentence, and its settings."""

    pictures: Mapping[str, Path]
    prompt: str
    settings: dict[str, Setting]


def drop_many(config: Config, jobs: Sequence[Dropped]) -> list[str]:
    """Put the files of several jobs into the inbox, all or none; gives their NAMEs.

    Raises:
        RequestError, OSError: as ``drop``.
    """
    names = [_new_name(job.prompt) for job in jobs]
    content: dict[str, Path | bytes] = {}
    for name, job in zip(names, jobs, strict=True):
        content |= _content(name, job.pictures, job.prompt, job.settings)
    folder = config.inbox / FOLDER
    made = not folder.is_dir()
    if away := folders.trouble("inbox", config):  # what is made underneath a share would lie hidden
        raise OSError(away)
    try:
        files.make_folder(folder)
        put(folder, content)
    except OSError as error:
        if made:
            with contextlib.suppress(OSError):  # never made, or another job is there by now
                folder.rmdir()
        raise OSError(
            f"nothing was dropped, the inbox could not be written: {error.strerror or error}"
        ) from error
    return names


def _content(
    name: str, given: Mapping[str, Path], prompt: str, settings: dict[str, Setting]
) -> dict[str, Path | bytes]:
    """Check the parts of a job; gives the contents of its files, with the one that completes it last."""
    parse_settings(settings, "the settings")
    text = _as_utf8(prompt, "the prompt")
    if len(text) > MAX_PROMPT_BYTES:
        raise RequestError(f"the prompt has {len(text)} bytes: it may have {MAX_PROMPT_BYTES}")
    if b"\0" in text:
        raise RequestError("the prompt holds a null character: leave it out")
    empty = not prompt.removeprefix("\ufeff").strip()
    if empty:
        settings = {**settings, "prompt": ""}  # an empty text file would be a mistake
    toml = _as_utf8(_as_toml(settings), "the settings")
    if len(toml) > MAX_SETTINGS_BYTES:
        raise RequestError(
            f"the settings have {len(toml)} bytes, most of them of the negative prompt: "
            f"they may have {MAX_SETTINGS_BYTES}"
        )
    pictures = {f"{name}{rest}{_suffix(picture)}": picture for rest, picture in given.items()}
    for source in pictures.values():
        if not source.is_file():
            raise FileNotFoundError(f"{source.name} is not here any more: upload it again")
    return {**pictures, f"{name}.toml": toml, **({} if empty else {f"{name}.txt": text})}


def _as_utf8(text: str, what: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise RequestError(
            f"{what} cannot be written as UTF-8: character {error.start + 1} is half of one (U+{code:04X}), "
            "as of an emoji that was cut in two: leave it out"
        ) from error


def put(folder: Path, content: Mapping[str, Path | bytes]) -> None:
    """Put files into a folder in their order, all of them or none.

    Raises:
        FileExistsError: one of that name is there.
        OSError: they cannot be written.
    """
    parts = {folder / f"{UNFINISHED}{name}.part": folder / name for name in content}
    there: list[Path] = []
    try:
        for part, source in zip(parts, content.values(), strict=True):
            if isinstance(source, Path):
                shutil.copyfile(source, part)
            else:
                part.write_bytes(source)
            files.sync_file(part)
        for part, target in parts.items():
            files.rename_new(part, target)
            there.append(target)
        files.sync_folder(folder)
    except BaseException:
        for path in reversed([*parts, *there]):  # the one that completes the job first
            with contextlib.suppress(OSError):
                path.unlink()
        raise


def remove_unfinished(config: Config) -> None:
    """Remove from the inbox the unfinished files of a page that was killed."""
    oldest = time.time() - UNFINISHED_SECONDS
    for part in (config.inbox / FOLDER).glob(f"{UNFINISHED}*.part"):
        with contextlib.suppress(OSError):
            if part.lstat().st_mtime < oldest:
                part.unlink()


def _new_name(prompt: str) -> str:
    """Make a NAME from the prompt that no other job has.

    >>> _new_name("The girl dances, gracefully!")[:-8]
    'the-girl-dances-gracefully-'
    """
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    return f"{'-'.join(words)[:MAX_WORDS].strip('-') or 'video'}-{secrets.token_hex(4)}"


def _suffix(picture: Path) -> str:
    suffix = picture.suffix.lower()
    if not is_picture(picture.name):
        why = heif.NOT_HERE if suffix in heif.ENDINGS else f"use {picture_types()}"
        raise RequestError(f"the picture is a {suffix or 'file without an ending'}: {why}")
    return suffix


def _as_toml(settings: dict[str, Setting]) -> str:
    """Write settings; JSON's strings are TOML's, but for DEL, which TOML wants escaped."""
    lines = (f"{key} = {_toml_value(value)}\n" for key, value in settings.items())
    return "".join(lines).replace("\x7f", "\\u007f")


def _toml_value(value: object) -> str:
    r"""Write a value in one line.

    >>> print(_toml_value([{"name": "slow", "weight": 0.8}]))
    [{name = "slow", weight = 0.8}]
    """
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml_value(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Look:
    """Where a dropped job stands."""

    job: Record | None  # as ``framepackd show --json`` has it; None: not taken in yet
    text: str  # the same for people
    alone: bool = False  # no daemon runs

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.job is not None and self.job["state"] in ENDED


def look(config: Config, name: str) -> Look:
    """Say where a dropped job stands; trouble that may pass raises no error, only the text names it."""
    try:
        job, answered = client.show(config, f"{FOLDER}/{name}")
    except Exception as error:  # a daemon that is ending, a database that is locked
        return Look(None, f"not known at the moment: {error}")
    if not answered and (job is None or job["state"] not in ENDED):
        return Look(job, "no daemon runs: the job waits until framepackd run is started", alone=True)
    return Look(job, describe(job) if job else "in the inbox: taken as soon as it has settled")


def describe(job: Record) -> str:
    """Say where a job stands, in one line."""
    if job["state"] == "done":
        seconds = job["frames"] / job["fps"]
        return (
            f"done: {job['frames']} frames, {seconds:.2f} s"
            + (f", but looks {job['quality']}" if job["quality"] else "")
            + "".join(f"; {warning}" for warning in job.get("warnings", ()))
        )
    words = job["error"] or ", ".join(job.get("stage") or ()) or job.get("note")
    return f"{job['state']}: {words}" if words else str(job["state"])
