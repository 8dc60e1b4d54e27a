"""Reads PNG files without the texts and profiles that would fill memory.

Pillow refuses a whole picture for one of them. Here they are left out, and the picture is read.
"""

import io
import zlib
from typing import BinaryIO, NamedTuple

from PIL import PngImagePlugin

MAX_PROFILE = 16 << 20  # bytes, when unpacked; those of printers take 4 MiB at most
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")


class Trimmed(NamedTuple):
    """What of a PNG file can be read."""

    file: BinaryIO  # without what Pillow would refuse it for
    profile: bytes | None = None  # its colour profile
    problem: str | None = None  # why its colour profile cannot be read


def is_png(head: bytes) -> bool:
    """Say whether a file that begins like this is PNG."""
    return head.startswith(_SIGNATURE)


def trim(file: BinaryIO) -> Trimmed:
    """Leave out texts and profiles that Pillow would not unpack; the file itself where there are none."""
    profile, problem, texts = None, None, 0
    kept: list[tuple[int, int]] = []  # from where to where
    whole_size = file.seek(0, io.SEEK_END)  # no more is asked for at once, whatever lengths it tells
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
    """Unpack a profile; None, and why, if it cannot be."""
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
    """Say how many bytes a text has when unpacked; None for one that Pillow would refuse."""
    if kind == b"tEXt":
        return len(content)
    rest = content.partition(b"\0")[2]
    if kind == b"iTXt":
        if rest[:1] in (b"", b"\0") or rest[1:2] != b"\0":
            return len(content)  # not packed, or in a way that Pillow passes over
        packed = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    elif rest[:1] not in (b"", b"\0"):
        return None
    else:
        packed = rest[1:]
    unpacker = zlib.decompressobj()
    try:
        size = len(unpacker.decompress(packed, PngImagePlugin.MAX_TEXT_CHUNK))
    except zlib.error:
        return 0  # passed over
    return None if unpacker.unconsumed_tail else size
