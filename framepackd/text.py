"""Puts names of files, texts of users, sizes and times into a form that can be printed."""

import hashlib
import json
import logging
import os
import re
import shlex
import unicodedata
from datetime import datetime
from typing import Any

from rich import filesize

LAST = "\U0010ffff"  # sorts after every other character
JOB_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{6}")
HOST_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,251}[A-Za-z0-9])?"  # of a machine of the cluster; ASCII
STAND_IN_BYTES = 100  # with a number and what follows NAME, within the 143 bytes of eCryptfs
# Devices on Windows, whatever follows a point.
RESERVED = re.compile(r"(?i:con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])")


def printable(text: str) -> str:
    r"""Show control characters as escapes: names and prompts must not control the terminal.

    >>> printable("new\nline")
    'new\\nline'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def path_of(folder: str, name: str) -> str:
    """Name a job with its folder below the inbox.

    >>> path_of("pets", "cat"), path_of("", "cat")
    ('pets/cat', 'cat')
    """
    return f"{folder}/{name}" if folder else name


def as_utf8(name: str) -> str:
    r"""Escape the bytes of a name that are not UTF-8: Linux allows them, JSON and SQLite do not.

    >>> as_utf8("caf" + chr(0xdce9))
    'caf\\udce9'
    """
    return name.encode("utf-8", "backslashreplace").decode()


def shell_word(path: str) -> str:
    r"""Quote a path for a shell, in printable characters only, so that a person can copy it.

    >>> print(shell_word("a cat.png"), shell_word("a" + chr(10) + "'b"))
    'a cat.png' $'a\x0a\'b'
    """
    if path.isprintable():  # bytes that are not UTF-8 are not
        return shlex.quote(path)
    return f"$'{''.join(_escaped(character) for character in path)}'"


def _escaped(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))


def rest_of_name(file: str, name: str) -> str:
    """Give what follows NAME in the name of one of its files.

    >>> rest_of_name("cat_end.png", "cat")
    '_end.png'
    """
    return unicodedata.normalize("NFC", file)[len(unicodedata.normalize("NFC", name)) :]


def stand_ins(name: str) -> list[str]:
    """Give names for a file or folder, to try one after another where a file system refuses them.

    First the name itself; then shorter, without characters that Windows, exFAT and SMB refuse; then in ASCII.

    >>> stand_ins("who?")
    ['who?', 'who_']
    >>> stand_ins("cat")
    ['cat']
    """
    held = _on_windows(name)
    plain = unicodedata.normalize("NFKD", held).encode("ascii", "ignore").decode()
    if not plain.strip("_. "):
        plain = f"name-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"
    return list(dict.fromkeys((name, held, _on_windows(plain) if held != plain else held)))


def _on_windows(name: str) -> str:
    held = "".join("_" if c in '<>:"/\\|?*' or not c.isprintable() else c for c in name)
    held = held.encode("utf-8", "replace")[:STAND_IN_BYTES].decode("utf-8", "ignore")
    end = held.rstrip(". ")
    held = end + "_" * (len(held) - len(end))
    first, point, rest = held.partition(".")
    return f"{first}_{point}{rest}" if RESERVED.fullmatch(first.rstrip()) else held


def printable_json(value: object) -> str:
    r"""Write JSON for people and programs, with escapes for characters that would control a terminal.

    >>> printable_json("caf" + chr(0xe9) + chr(0x9b))
    '"café\\u009b"'
    """
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def size_text(size: int | None) -> str:
    """Give a size in decimal units, as downloads have it: GB is 10⁹ bytes.

    >>> size_text(26_000_000_000), size_text(1_500_000), size_text(12), size_text(None)
    ('26.0 GB', '1.5 MB', '12 bytes', 'an unknown size')
    """
    return "an unknown size" if size is None else filesize.decimal(size)


class PrintableFormatter(logging.Formatter):
    """Keeps each message on one line, with escapes for characters that would control the terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Format the line of a message."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        """Format a traceback, line by line."""
        return "\n".join(map(printable, super().formatException(ei).split("\n")))


def percent(ratio: float) -> int:
    """Give a ratio in whole per cent, rounded down: 100 only for all of it.

    >>> percent(0.58), percent(0.9999), percent(1)
    (58, 99, 100)
    """
    return int(100 * ratio + 1e-6)


def clock(when: str, now: datetime, *, seconds: bool = False) -> str:
    """Give a time of UTC as clocks here show it, with the day of the week where that is not today's."""
    local = datetime.fromisoformat(when).astimezone()
    day = "" if local.date() == now.astimezone().date() else f"{local:%a} "
    return f"{day}{local:%H:%M:%S}" if seconds else f"{day}{local:%H:%M}"


def duration(seconds: float) -> str:
    """Give a span of time in words, in at most two units.

    >>> duration(7), duration(125), duration(3600 * 5 + 600), duration(86400 * 3)
    ('7 s', '2 min 5 s', '5 h 10 min', '3 d')
    """
    remaining = max(round(seconds), 0)
    words: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, remaining = divmod(remaining, length)
        if count or words:
            words.append(f"{count} {unit}" if count else "")
        if len(words) == 2:
            break
    return " ".join(filter(None, words)) or "0 s"
