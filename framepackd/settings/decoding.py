"""Decodes text that people wrote with an editor; names the encoding if it is not UTF-8."""

import codecs
from pathlib import Path

from framepack_core.errors import RequestError

MAX_PROMPT_BYTES = 1 << 16
# UTF-32 first: its mark begins with that of UTF-16.
MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def as_text(content: bytes, name: str) -> str:
    """Read UTF-8, with or without a byte order mark.

    Raises:
        RequestError: it is something else; the text names ``name``, the encoding, and what to do.
    """
    if kind := other_unicode(content):
        raise RequestError(
            f"{name} is {kind}: save it as UTF-8 (in Notepad: Save as, and there the encoding UTF-8)"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise RequestError(f"{name} is not UTF-8 ({wrong}): save it as UTF-8") from error
    if "\0" in text:
        raise RequestError(f"{name} holds null characters, so it is no text: save it as UTF-8 text")
    return text


def read_prompt(path: Path) -> str:
    """Read a prompt, without white space around it and with Unix line ends.

    Raises:
        RequestError: it is too long, or not UTF-8.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size > MAX_PROMPT_BYTES:
        raise RequestError(f"{path.name} has {size} bytes: a prompt may have {MAX_PROMPT_BYTES}: shorten it")
    return as_text(path.read_bytes(), path.name).replace("\r\n", "\n").strip()


def other_unicode(content: bytes) -> str | None:
    """Recognise UTF-16 and UTF-32 by their mark, or UTF-16 by its null bytes; None for anything else."""
    marked = next((kind for mark, kind in MARKS if content.startswith(mark)), None)
    if marked or b"\0" not in content:
        return marked
    for order in ("utf-16-le", "utf-16-be"):
        try:
            text = content.decode(order)
        except UnicodeDecodeError:
            continue
        if all(c.isprintable() or c in "\r\n\t" for c in text):  # and so it has no null character
            return "UTF-16"
    return None
