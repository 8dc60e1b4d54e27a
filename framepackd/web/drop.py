"""From a form to files in the inbox, and what becomes of them."""

import json
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framepack_core.errors import RequestError
from framepackd import client, files
from framepackd.config import Config
from framepackd.database import ENDED
from framepackd.groups import PICTURES
from framepackd.settings import parse_settings

FOLDER = "web"  # below the inbox, and so below the outbox
MAX_WORDS = 40  # characters of the prompt in a NAME


def drop(
    config: Config, *, picture: Path, prompt: str, settings: dict[str, Any], end_picture: Path | None = None
) -> str:
    """Put a job's files into the inbox, as anybody would; gives its NAME, which no other job has.

    ``settings`` are those of ``NAME.toml``; the daemon checks them again with everything else.

    Raises:
        RequestError: a setting is wrong, or a picture is of a kind that is not read.
        OSError: the inbox cannot be written.
    """
    parse_settings(settings, "the settings")
    name = _new_name(prompt)
    folder = config.inbox / FOLDER
    files.make_folder(folder)
    pictures = {f"{name}{_suffix(picture)}": picture}
    if end_picture is not None:
        pictures[f"{name}_end{_suffix(end_picture)}"] = end_picture
    for target, source in pictures.items():
        _copy(source, folder / target)
    if not prompt.strip():
        settings = {**settings, "prompt": ""}  # an empty text would be taken for a mistake
    files.write_text(folder / f"{name}.toml", _as_toml(settings))
    if prompt.strip():  # last: before it comes, the others wait
        files.write_text(folder / f"{name}.txt", prompt)
    return name


def _new_name(prompt: str) -> str:
    """Make up a NAME that people recognize and nobody else has.

    >>> _new_name("The girl dances, gracefully!")[:-8]
    'the-girl-dances-gracefully-'
    """
    words = re.findall(r"[a-z0-9]+", prompt.lower())
    return f"{'-'.join(words)[:MAX_WORDS].strip('-') or 'video'}-{secrets.token_hex(4)}"


def _suffix(picture: Path) -> str:
    suffix = picture.suffix.lower()
    if suffix not in PICTURES:
        raise RequestError(
            f"the picture is a {suffix or 'file without an ending'}: use {', '.join(PICTURES)}"
        )
    return suffix


def _copy(source: Path, target: Path) -> None:
    part = target.with_name(f"{files.PART_PREFIX}{target.name}.part")
    shutil.copyfile(source, part)
    files.sync_file(part)
    part.rename(target)


def _as_toml(settings: dict[str, Any]) -> str:
    """Write flat settings; JSON's strings are TOML's, but for DEL, which TOML wants escaped."""
    lines = (f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in settings.items())
    return "".join(lines).replace("\x7f", "\\u007f")


@dataclass(frozen=True)
class Look:
    """Where a dropped job stands."""

    job: dict[str, Any] | None  # as ``framepackd show --json`` has it; None: not taken in yet
    text: str  # the same for people

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.job is not None and self.job["state"] in ENDED


def look(config: Config, name: str) -> Look:
    """Look what has become of a dropped job; does not tell of trouble that may pass, but in words."""
    wanted = {"command": "show", "job": f"{FOLDER}/{name}"}
    try:
        answer = client.ask(config, wanted)
        job = answer["job"] if answer is not None else client.find(config, wanted["job"])
    except Exception as error:  # a daemon that is just ending, a database that is locked
        return Look(None, f"cannot tell just now: {error}")
    if answer is None and (job is None or job["state"] not in ENDED):
        return Look(job, "no daemon runs: the job waits until framepackd run is started")
    return Look(job, describe(job) if job else "in the inbox: taken as soon as it has settled")


def describe(job: dict[str, Any]) -> str:
    """Say in a line where a job stands."""
    if job["state"] == "done":
        seconds = job["frames"] / job["fps"]
        return f"done: {job['frames']} frames, {seconds:.2f} s" + (
            f", but looks {job['quality']}" if job.get("quality") else ""
        )
    if job["state"] != "running":
        return f"{job['state']}: {job['error']}" if job.get("error") else f"{job['state']}"
    if not job["section"]:
        return "running: loading the model"
    steps = job["steps"]
    where = "decoding" if job["step"] == steps else f"step {job['step']}/{steps}"
    return f"running: section {job['section']}/{job['sections']}, {where}"
