"""Removes from PNG files the texts and profiles that are too large or damaged.

Pillow refuses a whole picture because of one. Without them it reads the picture.
"""

import io
import zlib
from typing import BinaryIO, NamedTuple

from PIL import PngImagePlugin

MAX_PROFILE = 16 << 20  # bytes, unpacked; profiles of printers have at most 4 MiB
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")


class Trimmed(NamedTuple):
    """The readable part of a PNG file."""

    file: BinaryIO  # without the parts for which Pillow would refuse it
    profile: bytes | None = None  # its colour profile
    problem: str | None = None  # why its colour profile cannot be read


def is_png(head: bytes) -> bool:
    """Return whether a file that begins with ``head`` is PNG."""
    return head.startswith(_SIGNATURE)


def trim(file: BinaryIO) -> Trimmed:
    """Remove texts and profiles that Pillow would not unpack; the file itself if there are none."""
    profile, problem, texts = None, None, 0
    kept: list[tuple[int, int]] = []  # ranges of the file
    whole_size = file.seek(0, io.SEEK_END)  # never read more than this, whatever length a chunk claims
    begin = file.seek(len(_SIGNATURE))
    start, whole = 0, True
    while len(header := file.read(8)) == 8:
        length, kind = int.from_bytes(header[:4], "big"), header[4:]
        end = begin + 12 + length
        keep = True
        if kind == b"iCCP":
            profile, problem = _profile(file.read(min(length, whole_size)))
            keep = profile is not None and len(profile) <= PngImagePlugin.MAX_TEXT_CHUNK
        elif kind in _TEXTS:
            size = _text_size(kind, file.read(min(length, whole_size)))
            keep = size is not None and texts + size <= PngImagePlugin.MAX_TEXT_MEMORY
            texts += size if keep and size else 0
        if not keep:
            kept.append((start, begin))
            start, whole = end, False
        begin = file.seek(end)
        if kind == b"IEND":
            break
    if whole:
        return Trimmed(file, profile, problem)
    content = bytearray()
    for first, last in (*kept, (start, None)):
        file.seek(first)
        content += file.read() if last is None else file.read(last - first)
    return Trimmed(io.BytesIO(content), profile, problem)


def _profile(content: bytes) -> tuple[bytes | None, str | None]:
    """Unpack a profile; if that fails, give None and the reason."""
    packed = content.partition(b"\0")[2]
    unpacker = zlib.decompressobj()
    try:
        profile = unpacker.decompress(packed[1:], MAX_PROFILE)
    except zlib.error as error:
        return None, f"it is damaged ({error})"
    if unpacker.unconsumed_tail:
        return None, f"it has more than {MAX_PROFILE >> 20} MiB"
    if packed[:1] != b"\0" or not unpacker.eof:
        return None, "it is damaged (it ends early, or is packed in an unknown way)"
    return profile, None


def _text_size(kind: bytes, content: bytes) -> int | None:
    """Count the bytes of a text when unpacked; None if Pillow would refuse it."""
    if kind == b"tEXt":
        return len(content)
    rest = content.partition(b"\0")[2]
    if kind == b"iTXt":
        if rest[:1] in (b"", b"\0") or rest[1:2] != b"\0":
            return len(content)  # not packed, or packed in a way that Pillow ignores
        packed = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    elif rest[:1] not in (b"", b"\0"):
        return None
    else:
        packed = rest[1:]
    unpacker = zlib.decompressobj()
    try:
        size = len(unpacker.decompress(packed, PngImagePlugin.MAX_TEXT_CHUNK))
    except zlib.error:
        return 0  # Pillow ignores it
    return None if unpacker.unconsumed_tail else size
