"""Corrects the setting with which a job has failed, in the job's own settings file."""

import re
from dataclasses import dataclass
from pathlib import Path

import tomlkit
from tomlkit.exceptions import TOMLKitError

from framepackd import files
from framepackd.settings.job_settings import MAX_SETTINGS_BYTES, parse_settings

# Of a job's own file: what a folder's defaults say, or the configuration, is not one job's to change.
OF_A_SETTING = re.compile(
    r"(?P<file>[^/]+\.toml): (?P<key>\w+) must be (?P<allowed>[^;]+), got (?P<got>[^;]+)"
)
RANGE = re.compile(r"(?:a whole number from )?([0-9.]+) to ([0-9.]+)(?: in steps of ([0-9]+))?.*")


@dataclass(frozen=True)
class Wrong:
    """A setting with which a job has failed."""

    key: str
    allowed: str  # in words
    nearest: str  # that may be; empty where nothing is near


def wrong_setting(name: str, error: str | None) -> Wrong | None:
    """Tell from the reason of a failure which setting of NAME.toml is wrong; None if it is another reason.

    >>> wrong_setting("cat", "cat.toml: steps must be 1 to 100, got 101")
    Wrong(key='steps', allowed='1 to 100', nearest='100')
    >>> wrong_setting("cat", "cat.toml: width must be 32 to 4096 in steps of 16, got 100").nearest
    '96'
    >>> wrong_setting("cat", "_defaults.toml: steps must be 1 to 100, got 101")
    >>> wrong_setting("cat", "cat.toml: gs must be 1 to 32, got 99; seed must be 0 or more, got -1")
    """
    found = OF_A_SETTING.fullmatch(error or "")
    if found is None or found["file"] != f"{name}.toml":
        return None
    return Wrong(found["key"], found["allowed"], _nearest(found["allowed"], found["got"]))


def _nearest(allowed: str, got: str) -> str:
    span = RANGE.fullmatch(allowed)
    try:
        value = float(got)
    except ValueError:
        return ""
    if span is None:
        return ""
    step = float(span[3] or 0)
    value = min(max(value, float(span[1])), float(span[2]))
    return f"{value // step * step if step else value:g}"


def write_setting(path: Path, key: str, text: str) -> None:
    """Change a setting in a settings file; what else stands there stays as it is.

    Raises:
        RequestError: with it the settings are still wrong; nothing is written.
        OSError: the file cannot be read or written, or is no settings file any more.
    """
    with files.open_regular(path) as file:
        content = file.read(MAX_SETTINGS_BYTES + 1)
    try:
        document = tomlkit.parse(content.decode("utf-8-sig"))
    except (UnicodeDecodeError, TOMLKitError) as error:
        raise OSError(f"{path.name} has changed since: correct it in the failed folder") from error
    document[key] = _value(text)
    parse_settings(document.unwrap(), path.name)
    files.write_bytes(path, tomlkit.dumps(document).encode())


def _value(text: str) -> str | int | float:
    """Read what was typed into a box: a number, or else words."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
